"""Sampling: the right distribution, the same choice in any company, and the edges of each parameter."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels import AttentionShape, Draws, Kernels, sampling
from kernels.build import find_compiler
from kernels.cpu import CpuKernels
from kernels.cpu.targets import runnable_targets
from kernels.reference import ReferenceKernels
from tests.kernels.cpu_targets import BFLOAT16_ALONE
from worker.rng import draw, uniforms
from worker.sampler import choose, to_sampled
from worker.step import Sampled, SampledRows

CPU = torch.device("cpu")
SHAPE = AttentionShape(4, 2, 8, 16, 0.5, torch.float32, torch.float32)
VOCAB_SIZE = 600  # more than the reference looks at first, and not whole chunks
implementations: dict[str, Callable[[], Kernels]] = {"reference": lambda: ReferenceKernels(CPU, SHAPE)}
if find_compiler(["g++"]):
    for target in runnable_targets():
        if target not in BFLOAT16_ALONE:
            implementations[target.name] = functools.partial(CpuKernels, SHAPE, target)
kernels_in_use: list[Kernels] = []


@pytest.fixture(autouse=True, scope="module", params=implementations)
def _kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    kernels_in_use.append(implementations[request.param]())
    yield
    kernels_in_use.clear()


def sample(logits: torch.Tensor, rows: SampledRows) -> Sampled:
    return to_sampled(choose(logits, rows, kernels_in_use[0]))


def rows(
    num_rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, first_seed: int = 0
) -> SampledRows:
    return SampledRows(
        temperatures=np.full(num_rows, temperature, np.float32),
        top_k=np.full(num_rows, top_k, np.int64),
        top_p=np.full(num_rows, top_p, np.float32),
        min_p=np.full(num_rows, min_p, np.float32),
        seeds=draw(np.arange(first_seed, first_seed + num_rows, dtype=np.uint64), np.zeros(num_rows, np.int64)),
        output_indexes=np.arange(num_rows, dtype=np.int64) % 5,
        forbidden=(),
    )


def random_logits(num_rows: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return spread * torch.randn(num_rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))


def exact(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> NDArray[np.float64]:
    """The distribution by definition, in float64, one token after the other."""
    p = (logits.double() / temperature).softmax(0).numpy()
    order = np.argsort(-p, kind="stable")
    kept = list(order[: top_k or len(order)])
    total, mass, inside = p[kept].sum(), 0.0, []
    for token in kept:
        if inside and mass >= top_p * total:
            break
        inside.append(token)
        mass += p[token]
    result = np.zeros_like(p)
    inside = [token for token in inside if p[token] >= min_p * p.max()]
    result[inside] = p[inside]
    return result / result.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.7, 0, 0.9, 0.0),
        (1.3, 20, 1.0, 0.0),
        (1.0, 0, 1.0, 0.05),
        (0.8, 50, 0.8, 0.02),
        (3.0, 0, 0.95, 0.0),  # flat: top_p needs more than the first look
        (3.0, 400, 0.9, 0.0),
    ],
)
def test_distribution(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    num_samples = 20_000
    logits = random_logits(1)
    wanted = exact(logits[0], temperature, top_k, top_p, min_p)
    found = sample(logits.expand(num_samples, -1).clone(), rows(num_samples, temperature, top_k, top_p, min_p))
    counts = np.bincount(found.token_ids, minlength=VOCAB_SIZE)
    assert counts[wanted == 0].sum() == 0
    # Chi-square over tokens that are expected often enough, the rest as one; its mean is the number of bins.
    often = wanted * num_samples >= 5
    bins = np.append(counts[often], counts[~often].sum())
    means = np.append(wanted[often], wanted[~often].sum()) * num_samples
    statistic = ((bins - means)[means > 0] ** 2 / means[means > 0]).sum()
    num_bins = int((means > 0).sum())
    assert abs(statistic - num_bins) < 5 * math.sqrt(2 * num_bins) + 5


parameters = st.tuples(
    st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    st.sampled_from([0, 1, 3, 400, 5000]),
    st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    st.sampled_from([0.0, 0.1, 1.0]),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(parameters, min_size=2, max_size=12), st.integers(0, 1000), st.randoms())
def test_a_choice_does_not_depend_on_the_batch(
    settings_: list[tuple[float, int, float, float]], seed: int, shuffle: object
) -> None:
    count = len(settings_)
    columns = np.array(settings_)
    whole = SampledRows(
        columns[:, 0].astype(np.float32),
        columns[:, 1].astype(np.int64),
        columns[:, 2].astype(np.float32),
        columns[:, 3].astype(np.float32),
        np.arange(seed, seed + count, dtype=np.uint64),
        np.arange(count, dtype=np.int64),
        (),
    )
    logits = random_logits(count, seed)
    together = sample(logits.clone(), whole).token_ids
    order = np.random.default_rng(seed).permutation(count)
    assert sample(logits[order].clone(), whole.take(order)).token_ids.tolist() == together[order].tolist()
    alone = [sample(logits[i : i + 1].clone(), whole.take(np.array([i]))).token_ids[0] for i in range(count)]
    assert alone == together.tolist()


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 1100),
    st.sampled_from([0.01, 0.5, 2.0, 30.0]),
    st.sampled_from([0, 1, 2, 17, 300]),
    st.sampled_from([0.05, 0.5, 0.99, 1.0]),
    st.sampled_from([0.0, 0.02]),
    st.integers(0, 2**32 - 1),
)
def test_chooses_where_the_exact_distribution_does(
    vocab_size: int, spread: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    """The running sum of exact probabilities passes the row's number at the chosen id, give or take rounding."""
    num_rows = 20
    logits = spread * torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed))
    some = rows(num_rows, 0.9, top_k, top_p, min_p, first_seed=seed)
    found = sample(logits.expand(num_rows, -1).clone(), some).token_ids
    ends = exact(logits, 0.9, min(top_k, vocab_size), top_p, min_p).cumsum()
    numbers = uniforms(some.seeds, some.output_indexes)
    starts = np.concatenate([[0.0], ends])[found]
    assert (starts - 1e-5 <= numbers).all()
    assert (numbers <= ends[found] + 1e-5).all()


def test_random_numbers_are_uniform_and_never_one() -> None:
    seeds = np.repeat(np.arange(200, dtype=np.uint64), 200)
    numbers = uniforms(seeds, np.tile(np.arange(200, dtype=np.int64), 200))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    assert ((counts - 800) ** 2 / 800).sum() < 100
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.02
    assert uniforms(np.array([2**64 - 1], np.uint64), np.array([2**31])).shape == (1,)


def test_splitmix64_as_published() -> None:
    """The first outputs of the reference implementation, seeded with 0."""
    found = draw(np.zeros(3, np.uint64), np.arange(3))
    assert [hex(x) for x in found.tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


@pytest.mark.parametrize("sampler", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_narrowest_choice_is_the_argmax(sampler: dict[str, float]) -> None:
    logits = random_logits(50)
    found = sample(logits.clone(), rows(50, **sampler))  # type: ignore[arg-type]
    assert found.token_ids.tolist() == logits.argmax(-1).tolist()


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.zeros(3, VOCAB_SIZE)
    logits[1, [70, 500]] = 1.0
    logits[2, VOCAB_SIZE - 1] = 1.0
    assert sample(logits, rows(3, temperature=0.0)).token_ids.tolist() == [0, 70, VOCAB_SIZE - 1]


def test_equals_at_the_border_stay_in() -> None:
    logits = torch.full((2000, VOCAB_SIZE), -20.0)
    logits[:, [3, 5, 9]] = 1.0
    found = sample(logits, rows(2000, top_k=2))
    assert set(found.token_ids.tolist()) == {3, 5, 9}


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-45])
def test_smallest_temperatures_are_greedy(temperature: float) -> None:
    logits = random_logits(20)
    found = sample(logits.clone(), rows(20, temperature=temperature))
    assert found.is_finite.all()
    assert found.token_ids.tolist() == logits.argmax(-1).tolist()


def test_top_k_beyond_the_vocabulary_is_no_limit() -> None:
    logits = random_logits(500)
    free = sample(logits.clone(), rows(500)).token_ids
    assert sample(logits.clone(), rows(500, top_k=10**9)).token_ids.tolist() == free.tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_finite_are_told_apart(bad: float, temperature: float) -> None:
    logits = random_logits(3)
    wanted = sample(logits.clone(), rows(3, temperature, top_p=0.9)).token_ids
    logits[1, 17] = bad
    found = sample(logits, rows(3, temperature, top_p=0.9))
    assert found.is_finite.tolist() == [True, False, True]
    assert found.token_ids[[0, 2]].tolist() == wanted[[0, 2]].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_ids_are_not_sampled(temperature: float) -> None:
    logits = torch.full((2, VOCAB_SIZE), -30.0)
    logits[:, 7], logits[:, 8] = 20.0, 10.0
    base = rows(2, temperature)
    forbidding = replace(base, forbidden=((1, (7, VOCAB_SIZE + 5)),))
    found = sample(logits, forbidding)
    assert found.token_ids.tolist() == [7, 8]
    assert found.is_finite.all()


def test_each_row_has_its_own_forbidden_ids() -> None:
    """Some the likeliest, some beyond the vocabulary, some none."""
    logits = random_logits(5)
    likeliest = logits.argsort(dim=-1, descending=True)[:, :3].tolist()
    ids = [(), tuple(likeliest[1][:2]), (VOCAB_SIZE,), tuple(likeliest[3][1:]), tuple(likeliest[4][:1])]
    base = rows(5, 0.0)
    found = sample(logits, replace(base, forbidden=tuple(enumerate(ids))))
    assert found.token_ids.tolist() == [likeliest[i][at] for i, at in enumerate((0, 2, 0, 0, 1))]
    assert found.is_finite.all()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_log_probabilities_are_the_model_s_own(temperature: float) -> None:
    """Before temperature, filters and what is forbidden; of those rows alone that ask, and the same in any company."""
    logits = random_logits(6)
    likeliest = logits[2].argmax().item()
    asked = np.array([True, False, True, False, False, True])
    some = replace(rows(6, temperature, top_k=40, min_p=0.01), forbidden=((2, (likeliest,)),), reports_logprobs=asked)
    found = sample(logits.clone(), some)
    assert found.logprobs is not None
    assert found.logprobs.dtype == np.float32
    assert found.token_ids[2] != likeliest
    own = logits.double().log_softmax(-1).gather(1, torch.from_numpy(found.token_ids)[:, None])[:, 0].numpy()
    assert found.logprobs == pytest.approx(np.where(asked, own, 0.0), abs=1e-5)
    for row in np.flatnonzero(asked):
        alone = replace(some.take(np.array([row])), forbidden=((0, (likeliest,)),) if row == 2 else ())
        logprobs = sample(logits[row : row + 1].clone(), replace(alone, reports_logprobs=np.array([True]))).logprobs
        assert logprobs is not None
        assert logprobs[0] == found.logprobs[row]


def test_nobody_asks_for_log_probabilities() -> None:
    assert sample(random_logits(3), rows(3)).logprobs is None


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_row_that_is_not_finite_takes_no_other_s_log_probability(bad: float) -> None:
    logits = random_logits(3)
    asking = replace(rows(3), reports_logprobs=np.ones(3, np.bool_))
    wanted = sample(logits.clone(), asking).logprobs
    logits[1] = bad
    found = sample(logits, asking)
    assert found.is_finite.tolist() == [True, False, True]
    assert wanted is not None
    assert found.logprobs is not None
    assert found.logprobs[[0, 2]].tolist() == wanted[[0, 2]].tolist()


def test_rows_that_are_sorted_in_full_unasked_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU does with those that may need it."""
    num_rows = 2 * sampling.ROWS_SORTED + 5
    logits = random_logits(num_rows)
    draws = Draws(
        rows=np.arange(num_rows),
        temperatures=np.full(num_rows, 3.0, np.float32),
        top_k=np.resize([0, 7, 0, 400], num_rows),
        top_p=np.resize(np.array([0.5, 0.9, 0.95, 1.0, 0.999], np.float32), num_rows),
        min_p=np.zeros(num_rows, np.float32),
        uniforms=uniforms(np.arange(num_rows, dtype=np.uint64), np.zeros(num_rows, np.int64)),
    )
    looked_first = sampling.sample(logits.clone(), draws)
    monkeypatch.setattr(sampling, "_short", lambda is_enough, may_be_short: np.flatnonzero(may_be_short))
    assert sampling.sample(logits, draws).tolist() == looked_first.tolist()
