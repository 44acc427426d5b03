"""How well a model predicts a text, and how far two models are apart on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from folo import ops
from folo.errors import ConfigError
from folo.model.forward import forward, require_in_vocabulary
from folo.model.params import Params

_ROWS = 64  # of logits, scored together


@dataclass(frozen=True)
class Perplexity:
    """nats: the mean negative log-probability of `tokens` predictions."""

    nats: float
    tokens: int

    @property
    def value(self) -> float:
        return math.exp(self.nats)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same predictions.

    kl: the mean of KL(first || second) between their next-token distributions, in nats.
    agreement: the part of predictions whose likeliest token is the same.
    """

    first: Perplexity
    second: Perplexity
    kl: float
    agreement: float


def perplexity(
    params: Params, ids: Sequence[int], window: int = 1024, stride: int = 512, use_tqdm: bool = True
) -> Perplexity:
    """The perplexity of a text under sliding windows: every token but the first is predicted once.

    A window has up to `window` tokens and begins `stride` after the one before; it predicts the tokens that
    no earlier window held.

    Raises ConfigError if there are fewer than two tokens, if one is outside the vocabulary, or if not
    2 <= window <= max_position_embeddings and 1 <= stride < window.
    """
    losses = [
        -ops.pick_logprobs(logits, targets, 0)[0]
        for (logits,), targets in _predictions([params], ids, window, stride, use_tqdm)
    ]
    return _mean(losses)


def compare(
    first: Params,
    second: Params,
    ids: Sequence[int],
    window: int = 1024,
    stride: int = 512,
    use_tqdm: bool = True,
) -> Comparison:
    """Two models of one vocabulary on the predictions of `perplexity`. Raises ConfigError as that does."""
    if first.config.vocab_size != second.config.vocab_size:
        raise ConfigError(
            f"the vocabularies have {first.config.vocab_size} and {second.config.vocab_size} tokens: "
            "next-token distributions can only be compared over one"
        )
    losses, others, kl, agree = [], [], [], []
    for logits, targets in _predictions([first, second], ids, window, stride, use_tqdm):
        p, q = map(ops.log_softmax, logits)
        losses.append(-p.gather(1, targets[:, None])[:, 0])
        others.append(-q.gather(1, targets[:, None])[:, 0])
        kl.append((p.double().exp() * (p.double() - q.double())).sum(1))
        agree.append(p.argmax(1) == q.argmax(1))
    agreement = torch.cat(agree).double().mean()
    return Comparison(_mean(losses), _mean(others), float(torch.cat(kl).mean()), float(agreement))


@torch.no_grad()
def _predictions(
    models: Sequence[Params], ids: Sequence[int], window: int, stride: int, use_tqdm: bool
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Each model's logits `[R, V]`, and the tokens `[R]` that they are to predict, a few rows at a time."""
    limit = min(params.config.max_position_embeddings for params in models)
    if len(ids) < 2:
        raise ConfigError(f"the text has {len(ids)} tokens: there is nothing to predict")
    # The last one is only predicted: `forward` never sees it.
    require_in_vocabulary(models[0].config, min(ids), max(ids))
    if not 2 <= window <= limit:
        raise ConfigError(f"window={window}: expected 2 to {limit} tokens")
    if not 1 <= stride < window:
        raise ConfigError(f"stride={stride}: expected 1 to {window - 1}, less than the window")
    tokens = torch.tensor(ids, device=models[0].device)
    starts = range(0, max(1, len(ids) - window + stride), stride)
    known = 1  # tokens that need not be predicted any more
    for start in tqdm(starts, desc="Evaluating", unit="window", disable=not use_tqdm):
        end = min(start + window, len(ids))
        rows = [forward(params, tokens[start : end - 1])[known - start - 1 :].float() for params in models]
        for first in range(0, end - known, _ROWS):
            some = slice(first, first + _ROWS)
            yield [logits[some] for logits in rows], tokens[known:end][some]
        known = end


def _mean(losses: list[Tensor]) -> Perplexity:
    values = torch.cat(losses).double()
    return Perplexity(float(values.mean()), len(values))
