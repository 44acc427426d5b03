"""The sampler's arithmetic in plain torch: the oracle that faster kernels are compared with.

Every function here keeps the invariance contract: a row of the output depends, bit for bit, on that row's
inputs alone, not on the number of rows, the row's place or the number of threads. So each uses only what
has one order: elementwise arithmetic, maxima, stable sorts, `row_sum`, and sums of *integers*.

Cumulative sums are where libraries differ most (torch's CPU scan accumulates in float64; its CUDA scan
picks its tree by the number of rows). Here softmax weights are first cut to fixed point, multiples of
2^-40 of the largest weight. Sums of integers are exact in any order, so a cumulative weight has one value
on every device, grows monotonically and ends at the total: inverse CDF needs no tolerance and has no
overflow case. A weight below 2^-40 of the largest counts as zero; u itself has 24 bits only.

R is the number of rows, V the vocabulary (at most 2^22, so that sums stay below 2^62). No function changes
its inputs, and none reads a tensor on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from folo.ops.reduce import row_sum

PURPOSE_DRAW = 0
"""The `purpose` word of the Philox counter for the draw of a token."""

NO_TOKEN = -1
"""What `draw` returns for a row that holds NaN or +inf, or in which every token is banned."""

_FRACTION_BITS = 40
_WORD = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3; SC 2011).

    counter int64[R, 4] and key int64[R, 2] hold 32-bit words, 0 <= word < 2^32; so does the result,
    int64[R, 4].
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(_PHILOX_ROUNDS):
        high0, low0 = _multiply(c0, _PHILOX_MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _PHILOX_MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _WORD, (k1 + _PHILOX_WEYL[1]) & _WORD
    return torch.stack([c0, c1, c2, c3], dim=-1)


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and low 32 bits of a product of 32-bit words, in halves: int64 cannot hold all 64 bits."""
    lower = word * (factor & 0xFFFF)
    upper = word * (factor >> 16)
    high = (upper + (lower >> 16)) >> 16
    low = (lower + ((upper & 0xFFFF) << 16)) & _WORD
    return high, low


def philox(seed: Tensor, position: Tensor, sample_index: Tensor, purpose: int) -> Tensor:
    """One uniform number for each row, float32[R] in [0, 1), a multiple of 2^-24.

    seed int64[R] is a 64-bit unsigned seed in two's complement; position int64[R] is the absolute index of
    the token to sample; sample_index int64[R] tells siblings apart; purpose keeps the uses of one seed
    apart. All but the seed count modulo 2^32.
    """
    key = torch.stack([seed & _WORD, (seed >> 32) & _WORD], dim=-1)
    purposes = torch.full_like(position, purpose & _WORD)
    counter = torch.stack(
        [position & _WORD, sample_index & _WORD, purposes, torch.zeros_like(position)], dim=-1
    )
    return (philox4x32(counter, key)[:, 0] >> 8).to(torch.float32) * 2.0**-24


def penalize(
    logits: Tensor,
    history: Tensor,
    history_start: Tensor,
    prompt_len: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
    bias_row: Tensor,
    bias_id: Tensor,
    bias_value: Tensor,
) -> Tensor:
    """Penalties for tokens that occurred, then biases: logits float32[R, V] -> float32[R, V].

    history int64[H] is ragged: row r's tokens, prompt then output, each in [0, V), are
    history[history_start[r]:history_start[r + 1]], the first prompt_len[r] of them the prompt;
    history_start int64[R + 1] begins at 0 and ends at H. A row without penalties has an empty history.

    repetition float32[R] divides positive and multiplies negative logits of tokens in prompt or output
    (Keskar et al., CTRL, 2019, as in transformers); frequency float32[R] times the count, then presence
    float32[R], are subtracted for tokens in the output (as in vLLM). Neutral values are 1, 0 and 0.

    bias float32[B] at (bias_row int64[B], bias_id int64[B]) is added last; -inf bans a token. At most one
    finite bias for each place, any number of -inf.
    """
    rows, vocabulary = logits.shape
    index = torch.arange(history.shape[0], device=history.device)
    row = torch.searchsorted(history_start[1:], index, right=True)
    in_output = index - history_start[row] >= prompt_len[row]
    place = row * vocabulary + history

    # Integer counts are exact whatever order atomics add them in.
    zeros = torch.zeros(rows * vocabulary, dtype=torch.int32, device=logits.device)
    seen = zeros.index_add(0, place, torch.ones_like(place, dtype=torch.int32)).view(rows, vocabulary) > 0
    count = zeros.index_add(0, place, in_output.to(torch.int32)).view(rows, vocabulary)

    repeated = torch.where(logits < 0, logits * repetition[:, None], logits / repetition[:, None])
    penalized = torch.where(seen, repeated, logits)
    lowered = penalized - frequency[:, None] * count.to(torch.float32) - presence[:, None]
    penalized = torch.where(count > 0, lowered, penalized)
    return penalized.index_put((bias_row, bias_id), bias_value, accumulate=True)


def warp(
    logits: Tensor, temperature: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor, truncate: bool = True
) -> Tensor:
    """Temperature, min-p, top-k, top-p, in this order: logits float32[R, V] -> float32[R, V].

    A token that is filtered gets -inf; the others get their logit over the temperature. Each transform
    works on what the ones before it left. One that is off leaves a row's bits alone.

    temperature float32[R] >= 0; 0 stands for greedy and scales nothing.
    min_p float32[R] in [0, 1]: drops tokens less likely than min_p times the likeliest; 0 is off.
    top_k int64[R]: keeps the k largest and every tie with the k-th; 0 and -1 are off.
    top_p float32[R] in (0, 1]: keeps the shortest prefix, by value descending then id ascending, whose
        probability reaches top_p, one token at least (Holtzman et al., 2020); 1 is off.
    truncate: False skips the sort that top-k and top-p need; for callers who know that no row uses either.
    """
    logits = logits / torch.where(temperature == 0, 1.0, temperature)[:, None]
    logits = torch.where(_weights(logits) < min_p[:, None], -torch.inf, logits)
    if not truncate:
        return logits

    vocabulary = logits.shape[-1]
    descending, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    k = torch.where((top_k <= 0) | (top_k > vocabulary), vocabulary, top_k)
    # Not ">=": a row that holds NaN must come through as it is, for `draw` to refuse.
    keep = ~(descending < descending.gather(-1, k[:, None] - 1))

    weight = _fixed_point(torch.where(keep, descending, -torch.inf))
    reached = weight.cumsum(-1)
    before = reached - weight
    wanted = top_p[:, None].to(torch.float64) * reached[:, -1:].to(torch.float64)
    keep = keep & ((before.to(torch.float64) < wanted) | (before == 0) | (top_p >= 1)[:, None])
    return torch.where(torch.zeros_like(keep).scatter(-1, ids, keep), logits, -torch.inf)


def draw(logits: Tensor, greedy: Tensor, u: Tensor) -> Tensor:
    """One token id for each row of warped logits float32[R, V]: int64[R].

    Where greedy bool[R] is set, the smallest id of the largest logit. Elsewhere inverse CDF over ids in
    ascending order: the first id whose cumulative weight exceeds u times the total, u float32[R] in
    [0, 1), a multiple of 2^-24. That id has non-zero weight. A row that has no finite maximum gives
    NO_TOKEN.
    """
    reached = _fixed_point(logits).cumsum(-1)
    total = reached[:, -1]
    # floor(u * total), exactly: u = m / 2^24, and m * total would not fit 64 bits.
    m = (u * 2.0**24).to(torch.int64)
    target = m * (total >> 24) + ((m * (total & 0xFFFFFF)) >> 24)
    drawn = torch.searchsorted(reached, target[:, None], right=True)[:, 0]
    return torch.where(total > 0, torch.where(greedy, logits.argmax(-1), drawn), NO_TOKEN)


def log_softmax(logits: Tensor) -> Tensor:
    """Natural-log probabilities of logits float32[R, V]: float32[R, V]."""
    shifted = (logits - logits.amax(-1, keepdim=True)).contiguous()
    return shifted - torch.log(row_sum(torch.exp(shifted)))[:, None]


def pick_logprobs(logits: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of ids int64[R] and of the k likeliest tokens (0 <= k <= V), from logits [R, V].

    Returns logprob float32[R]; rank int64[R], 1 plus the number of tokens with a strictly greater
    log-probability; top_ids int64[R, k] and top_logprobs float32[R, k], by value descending, then id
    ascending.
    """
    return pick(log_softmax(logits), ids, k)


def pick(logprobs: Tensor, ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `pick_logprobs` returns, from log-probabilities [R, V]."""
    picked = logprobs.gather(-1, ids[:, None])
    rank = 1 + (logprobs > picked).sum(-1)

    # topk promises no order among ties, so there are none: the value's bits, made to sort as the value does,
    # stand above the id's. (-0.0 would sort below 0.0, but no difference here is -0.0.)
    bits = logprobs.view(torch.int32).to(torch.int64)
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    descending_id = torch.arange(logprobs.shape[-1], 0, -1, device=logprobs.device)
    top_ids = ((ordered << 32) + descending_id).topk(k, dim=-1).indices
    return picked[:, 0], rank, top_ids, logprobs.gather(-1, top_ids)


def _weights(logits: Tensor) -> Tensor:
    """exp(logit - largest logit), float32[R, V] in [0, 1]; all zero where the largest is not finite.

    Zero instead of NaN, since NaN as an integer is undefined. Contiguous, since torch promises the same
    routine for every element to contiguous tensors only.
    """
    return torch.exp((logits - logits.amax(-1, keepdim=True)).contiguous()).nan_to_num(nan=0.0)


def _fixed_point(logits: Tensor) -> Tensor:
    """Softmax weights as int64[R, V]: multiples of 2^-40 of the row's largest weight, rounded down."""
    return (_weights(logits) * 2.0**_FRACTION_BITS).to(torch.int64)
