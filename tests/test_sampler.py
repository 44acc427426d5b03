"""The sampler's arithmetic: what it computes, and that a row depends on that row alone."""

import math
from collections.abc import Callable

import pytest
import torch
from logits import generator, random_logits, warp_of
from torch import Tensor

from folo.ops import draw, log_softmax, penalize, philox, pick_logprobs, warp
from folo.ops.reduce import row_sum
from folo.ops.sampler import NO_TOKEN

pytestmark = pytest.mark.usefixtures("each_instruction_set")

INF = math.inf
LAST_U = 1 - 2.0**-24
ROWS = 70

Op = Callable[[list[int]], tuple[Tensor, ...]]
"""An op applied to the chosen rows of a fixed problem: the outputs' rows are in the same order."""


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def problems(vocabulary: int) -> dict[str, Op]:
    """Each op on ROWS rows with parameters that differ by row, some of them off."""
    logits = random_logits(vocabulary, ROWS)
    index = torch.arange(ROWS)
    temperature = torch.tensor([0.0, 0.7, 1.0, 1.3])[index % 4]
    min_p = torch.tensor([0.0, 0.05, 0.0])[index % 3]
    top_k = torch.tensor([0, 5, -1, 40, vocabulary + 1])[index % 5]
    top_p = torch.tensor([1.0, 0.9, 0.5])[index % 3]
    u = torch.rand(ROWS, generator=generator(2))
    ids = torch.randint(vocabulary, (ROWS,), generator=generator(3))
    histories = [torch.randint(vocabulary, (r % 7 * 5,), generator=generator(r)) for r in range(ROWS)]
    repetition, presence, frequency = 1 + index / 50, index / 100, -index / 200

    def penalize_rows(rows: list[int]) -> tuple[Tensor, ...]:
        lengths = torch.tensor([0, *[len(histories[r]) for r in rows]])
        return (
            penalize(
                logits[rows],
                torch.cat([histories[r] for r in rows]),
                lengths.cumsum(0),
                torch.tensor([len(histories[r]) // 3 for r in rows]),
                repetition[rows],
                presence[rows],
                frequency[rows],
                torch.arange(len(rows)),
                ids[rows],
                u[rows],
            ),
        )

    return {
        "penalize": penalize_rows,
        "warp": lambda rows: (warp(logits[rows], temperature[rows], min_p[rows], top_k[rows], top_p[rows]),),
        "draw": lambda rows: (draw(logits[rows], index[rows] % 4 == 0, u[rows]),),
        "log_softmax": lambda rows: (log_softmax(logits[rows]),),
        "pick_logprobs": lambda rows: pick_logprobs(logits[rows], ids[rows], 5),
        "row_sum": lambda rows: (row_sum(logits[rows].exp()),),
    }


@pytest.mark.parametrize("vocabulary", [17, 128, 1000, 49152, 50001])
@pytest.mark.parametrize("op", ["penalize", "warp", "draw", "log_softmax", "pick_logprobs", "row_sum"])
def test_a_row_depends_on_itself_alone(op: str, vocabulary: int, threads: Callable[[int], None]) -> None:
    apply = problems(vocabulary)[op]
    threads(1)
    alone = [torch.cat(parts) for parts in zip(*[apply([r]) for r in range(ROWS)], strict=True)]
    shuffled = torch.randperm(ROWS, generator=generator(4)).tolist()
    for count in (1, 2):
        threads(count)
        for rows in [*[list(range(n)) for n in (*range(1, 10), 64, 70)], shuffled, shuffled[:8]]:
            for together, expected in zip(apply(rows), alone, strict=True):
                assert torch.equal(together, expected[rows]), (rows, count)


@pytest.mark.parametrize("vocabulary", [17, 128, 50001])
def test_no_op_changes_its_inputs(vocabulary: int) -> None:
    logits = random_logits(vocabulary, ROWS)
    copy = logits.clone()
    warp_of(logits, 0.5, 0.1, 3, 0.5)
    draw(logits, torch.zeros(ROWS, dtype=torch.bool), torch.zeros(ROWS))
    pick_logprobs(logits, torch.zeros(ROWS, dtype=torch.int64), 2)
    one_token_penalized(logits, bias=1.0)
    assert torch.equal(bits(logits), bits(copy))


# --- row_sum


@pytest.mark.parametrize("length", [0, 1, 2, 3, 8, 577, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_sum_is_the_sum_in_its_own_dtype(length: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, length, generator=generator(0), dtype=dtype)
    total = row_sum(x)
    assert total.shape == (2, 3)
    assert total.dtype == dtype
    torch.testing.assert_close(total, x.sum(-1), rtol=1e-5, atol=1e-4)


def test_row_sum_adds_the_halves() -> None:
    """2^24 + 1 is 2^24 in float32, so that the order shows: from the left the second is 2."""
    big = 2.0**24
    assert row_sum(torch.tensor([big, 1.0, -big, 1.0])).item() == 2.0
    assert row_sum(torch.tensor([big, -big, 1.0, 1.0])).item() == 1.0


def test_row_sum_under_function_transforms() -> None:
    x = torch.randn(5, 7, generator=generator(0), dtype=torch.float64)

    def squares(row: Tensor) -> Tensor:
        return row_sum(row * row)

    assert torch.equal(torch.func.vmap(row_sum)(x), row_sum(x))
    assert torch.equal(torch.func.vmap(torch.func.grad(squares))(x), 2 * x)
    tangent = torch.func.jvp(squares, (x[0],), (torch.ones(7, dtype=torch.float64),))[1]
    torch.testing.assert_close(tangent, 2 * x[0].sum())


# --- penalize


def one_token_penalized(logits: Tensor, **changed: float) -> Tensor:
    """Every row: prompt [1, 2], output [2, 3, 3], and the bias on token 4."""
    rows = len(logits)
    value = {"repetition": 1.0, "presence": 0.0, "frequency": 0.0, "bias": 0.0} | changed
    return penalize(
        logits,
        torch.tensor([1, 2, 2, 3, 3]).repeat(rows),
        torch.arange(rows + 1) * 5,
        torch.full((rows,), 2),
        torch.full((rows,), value["repetition"]),
        torch.full((rows,), value["presence"]),
        torch.full((rows,), value["frequency"]),
        torch.arange(rows),
        torch.full((rows,), 4),
        torch.full((rows,), value["bias"]),
    )


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"repetition": 2.0}, [4.0, 2.0, -8.0, 2.0, 4.0]),
        ({"presence": 0.5}, [4.0, 4.0, -4.5, 3.5, 4.0]),
        ({"frequency": 0.5}, [4.0, 4.0, -4.5, 3.0, 4.0]),
        ({"bias": -1.5}, [4.0, 4.0, -4.0, 4.0, 2.5]),
        ({"bias": -INF}, [4.0, 4.0, -4.0, 4.0, -INF]),
        ({"repetition": 2.0, "presence": 0.5, "frequency": 0.25}, [4.0, 2.0, -8.75, 1.0, 4.0]),
    ],
)
def test_penalties_by_hand(changed: dict[str, float], expected: list[float]) -> None:
    """Repetition counts prompt and output, presence and frequency the output only."""
    logits = torch.tensor([[4.0, 4.0, -4.0, 4.0, 4.0]])
    assert one_token_penalized(logits, **changed).tolist() == [expected]
    assert one_token_penalized(logits.repeat(3, 1), **changed).tolist() == [expected] * 3


def test_ragged_histories_reach_their_own_rows() -> None:
    """Rows 0, 2 and 4 have no history; each of the others lowers its own tokens."""
    empty = torch.zeros(0, dtype=torch.int64)
    got = penalize(
        torch.zeros(5, 4),
        torch.tensor([0, 3, 3]),
        torch.tensor([0, 0, 1, 1, 3, 3]),
        torch.zeros(5, dtype=torch.int64),
        torch.ones(5),
        torch.full((5,), 1.0),
        torch.zeros(5),
        empty,
        empty,
        torch.zeros(0),
    )
    assert got.tolist() == [[0, 0, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, -1], [0, 0, 0, 0]]


def test_a_ban_wins_over_a_finite_bias_in_any_order() -> None:
    for values in ([-INF, 5.0], [5.0, -INF], [-INF, -INF]):
        got = penalize(
            torch.zeros(1, 3),
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(2, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
            torch.ones(1),
            torch.zeros(1),
            torch.zeros(1),
            torch.tensor([0, 0]),
            torch.tensor([1, 1]),
            torch.tensor(values),
        )
        assert got.tolist() == [[0.0, -INF, 0.0]]


def test_neutral_penalties_leave_the_bits_alone() -> None:
    logits = random_logits(17, ROWS)
    logits[0, 2] = -0.0
    none = torch.zeros(0, dtype=torch.int64)
    rows = len(logits)
    neutral = torch.zeros(rows)
    got = penalize(
        logits,
        torch.arange(5).repeat(rows),
        torch.arange(rows + 1) * 5,
        torch.full((rows,), 2),
        neutral + 1,
        neutral,
        neutral,
        none,
        none,
        torch.zeros(0),
    )
    assert torch.equal(bits(got), bits(logits))


# --- draw


def drawn(row: list[float], *u: float, greedy: bool = False) -> list[int]:
    logits = torch.tensor([row] * len(u))
    return draw(logits, torch.full((len(u),), greedy), torch.tensor(u)).tolist()


def test_draw_inverts_the_cumulative_distribution() -> None:
    """Probabilities 1/4, 1/4, 1/2: an id's interval is closed below and open above."""
    quarter, half = 0.0, math.log(2)
    assert drawn([quarter, quarter, half], 0.0, 0.25 - 2**-24, 0.25, 0.5 - 2**-24, 0.5, LAST_U) == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]


def test_draw_at_the_ends_of_the_unit_interval() -> None:
    assert drawn([-INF, 0.0, 0.0, -INF], 0.0, LAST_U) == [1, 2]
    assert drawn([-INF, -INF, -INF, 0.0], 0.0, 0.5, LAST_U) == [3, 3, 3]
    assert drawn([-INF, 5.0, -INF, -INF], 0.0, 0.5, LAST_U) == [1, 1, 1]
    assert drawn([-1e4, 0.0, 3e38, -3e38], 0.0, 0.5, LAST_U) == [2, 2, 2]


def test_draw_never_takes_a_banned_token_however_many_follow() -> None:
    """The cumulative weight is flat over 150,000 banned tokens: the last u still falls before them."""
    row = torch.full((1, 150_000), -INF)
    row[0, 10:20] = 0.0
    one = torch.zeros(1, dtype=torch.bool)
    assert draw(row, one, torch.tensor([0.0])).item() == 10
    assert draw(row, one, torch.tensor([LAST_U])).item() == 19


def test_draw_from_a_flat_distribution_is_exact_over_a_large_vocabulary() -> None:
    """A float32 running sum of 100,000 equal weights would be off by whole tokens at the end."""
    vocabulary = 100_000
    wanted = torch.tensor([0, 1, 17, 50_000, 99_998, 99_999])
    u = ((wanted + 0.5) / vocabulary * 2**24).floor() / 2**24
    logits = torch.zeros(len(wanted), vocabulary)
    assert torch.equal(draw(logits, torch.zeros(len(wanted), dtype=torch.bool), u), wanted)


def test_draw_is_exact_at_every_boundary() -> None:
    """The first u, of 2^24, that reaches each id, computed with unbounded integers."""
    row = torch.randn(50, generator=generator(6))
    weights = [int(weight * 2**40) for weight in torch.exp(row - row.max()).tolist()]
    total = sum(weights)
    for i in range(1, 50):
        first = -(-sum(weights[:i]) * 2**24 // total)
        assert drawn(row.tolist(), (first - 1) / 2**24, first / 2**24) == [i - 1, i]


def test_greedy_takes_the_smallest_id_of_the_largest_logit() -> None:
    assert drawn([0.0, 2.0, 2.0, -INF], 0.0, 0.99, greedy=True) == [1, 1]
    logits = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert draw(logits, torch.tensor([True, False]), torch.tensor([0.0, 0.0])).tolist() == [1, 0]


@pytest.mark.parametrize("row", [[-INF, -INF], [0.0, math.nan], [math.nan, math.nan], [0.0, INF]])
@pytest.mark.parametrize("greedy", [True, False])
def test_a_row_that_cannot_be_drawn_from_says_so(row: list[float], greedy: bool) -> None:
    assert drawn(row, 0.5, greedy=greedy) == [NO_TOKEN]
    logits = torch.tensor([row, [0.0, -INF]])
    assert draw(logits, torch.tensor([greedy, greedy]), torch.zeros(2)).tolist() == [NO_TOKEN, 0]


@pytest.mark.parametrize("vary", ["seed", "position", "sample_index"])
def test_draws_follow_the_distribution_whichever_part_of_the_counter_varies(vary: str) -> None:
    """20,000 draws over 20 tokens, chi-square below the 99.9 % point of 19 degrees, 43.8."""
    count, index = 20_000, torch.arange(20_000)
    row = torch.randn(20, generator=generator(8))
    same = torch.full((count,), 3)
    seed, position, sample = (
        index if vary == name else same for name in ("seed", "position", "sample_index")
    )
    ids = draw(row.expand(count, 20), torch.zeros(count, dtype=torch.bool), philox(seed, position, sample, 0))
    expected = torch.softmax(row, -1) * count
    observed = torch.bincount(ids, minlength=20)
    assert float(((observed - expected) ** 2 / expected).sum()) < 43.8


# --- log-probabilities


@pytest.mark.parametrize("vocabulary", [17, 1000, 50001])
def test_log_softmax_is_the_logarithm_of_the_softmax(vocabulary: int) -> None:
    logits = random_logits(vocabulary, ROWS)
    expected = torch.log_softmax(logits.double(), -1).float()
    torch.testing.assert_close(log_softmax(logits), expected, rtol=1e-6, atol=2e-6)


def test_ranks_and_ties() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0, 1.0, -INF]] * 3)
    logprob, rank, top_ids, top_logprobs = pick_logprobs(logits, torch.tensor([4, 3, 5]), 6)
    assert rank.tolist() == [3, 1, 6]
    assert top_ids.tolist() == [[1, 3, 2, 4, 0, 5]] * 3
    expected = torch.log_softmax(logits, -1)
    torch.testing.assert_close(logprob, expected[[0, 1, 2], [4, 3, 5]])
    torch.testing.assert_close(top_logprobs, expected.gather(-1, top_ids))


def test_all_tied_tokens_come_in_the_order_of_their_ids() -> None:
    _, rank, top_ids, _ = pick_logprobs(torch.zeros(2, 50001), torch.tensor([0, 50000]), 20)
    assert rank.tolist() == [1, 1]
    assert top_ids.tolist() == [list(range(20))] * 2


@pytest.mark.parametrize("k", [0, 1, 50, 1000])
@pytest.mark.parametrize("vocabulary", [1000, 1003, 50001])
def test_top_logprobs_and_ranks_agree_with_a_stable_sort(vocabulary: int, k: int) -> None:
    logits = random_logits(vocabulary, ROWS)
    chosen = torch.randint(vocabulary, (ROWS,), generator=generator(k))
    logprob, rank, top_ids, top_logprobs = pick_logprobs(logits, chosen, k)
    expected = log_softmax(logits)
    values, ids = torch.sort(expected, dim=-1, descending=True, stable=True)
    assert torch.equal(logprob, expected[torch.arange(ROWS), chosen])
    assert torch.equal(rank, 1 + (expected > logprob[:, None]).sum(-1))
    assert torch.equal(top_ids, ids[:, :k])
    assert torch.equal(top_logprobs, values[:, :k])


def test_no_top_logprobs() -> None:
    _, _, top_ids, top_logprobs = pick_logprobs(torch.zeros(2, 4), torch.tensor([0, 1]), 0)
    assert top_ids.shape == top_logprobs.shape == (2, 0)
