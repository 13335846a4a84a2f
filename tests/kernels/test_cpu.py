"""The CPU kernels against dense attention in float64, for each instruction set that this machine runs."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import AttentionShape, BlockCopy, LayerKV, select_kernels
from kernels.build import find_compiler
from kernels.cpu import PARTITION_LEN, CpuKernels
from kernels.cpu.targets import AMX, BASELINE, Target, runnable_targets
from kernels.kv_format import LARGEST
from kernels.reference import ReferenceKernels
from tests.kernels.cases import Case, Step, relative_error, write_plain
from tests.kernels.cpu_targets import (
    BFLOAT16_ALONE,
    DOTS,
    DTYPES,
    TILES,
    USED,
    all_targets,
    fitting_dtype,
    targets,
    used_targets,
)
from tests.kernels.guarded import guarded

pytestmark = pytest.mark.skipif(find_compiler(["g++"]) is None, reason="no g++")
# Relative errors: what rounding the output loses, and a little.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 5e-4}

cases = st.builds(
    Case,
    num_kv_heads=st.integers(1, 3),
    group_size=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 12, 16, 20]),
    head_dim=st.sampled_from([8, 12, 16, 24, 64, 80, 96, 128, 256]),
    block_size=st.sampled_from([16, 32]),
    sliding_window=st.sampled_from([0, 0, 1, 5, 16, 40, 200]),
    lens=st.lists(
        st.tuples(st.integers(0, 280), st.one_of(st.just(1), st.just(1), st.integers(1, 40))), min_size=1, max_size=5
    ),
    seed=st.integers(0, 2**32 - 1),
)


any_dtypes = st.sampled_from(DTYPES)


def of_dtypes(case: Case, dtypes: tuple[torch.dtype, torch.dtype], target: Target | None = None) -> Case:
    """The case of dtypes that fit the target."""
    dtype, kv_dtype = (fitting_dtype(target, dtype) if target else dtype for dtype in dtypes)
    return dataclasses.replace(case, dtype=dtype, kv_dtype=kv_dtype)


@pytest.mark.parametrize(
    ("target", "dtypes"),
    [
        *((target, dtypes) for target in runnable_targets() for dtypes in DTYPES if target not in BFLOAT16_ALONE),
        *((target, (torch.bfloat16, torch.bfloat16)) for target in BFLOAT16_ALONE),
        (TILES, (torch.bfloat16, torch.int8)),
        pytest.param(DOTS, (torch.bfloat16, torch.int8), marks=pytest.mark.slow),
    ],
    ids=lambda value: value.name if isinstance(value, Target) else str(value),
)
@settings(max_examples=10, deadline=None)
@given(case=cases)
def test_equals_dense_attention(target: Target, dtypes: tuple[torch.dtype, torch.dtype], case: Case) -> None:
    case = of_dtypes(case, dtypes)
    step = Step(case)
    found = step.run(CpuKernels(case.shape, target))
    assert relative_error(found, step.dense()) < TOLERANCES[case.dtype]


def longer(case: Case) -> Case:
    """One decode of so many tokens that it is split."""
    return dataclasses.replace(case, lens=[*case.lens, (1500, 1)])


@targets
@settings(max_examples=4, deadline=None)
@given(case=cases)
def test_split_sequences_equal_dense_attention(target: Target, case: Case) -> None:
    case = of_dtypes(case, (torch.float32, torch.float32), target)
    step = Step(longer(case))
    found = step.run(CpuKernels(case.shape, target))
    assert relative_error(found, step.dense()) < TOLERANCES[case.dtype]


# Both ways to score; the other targets' libraries, which the cap alone needs, would take a minute to compile.
CAPPED = [
    (USED[0], torch.float32),
    (TILES, torch.bfloat16),
    *(pytest.param(target, torch.float32, marks=pytest.mark.slow) for target in runnable_targets()[1:]),
    *(pytest.param(target, torch.bfloat16, marks=pytest.mark.slow) for target in USED if target != TILES),
]


@pytest.mark.parametrize(("target", "dtype"), CAPPED, ids=lambda value: str(getattr(value, "name", value)))
@settings(max_examples=10, deadline=None)
@given(case=cases, soft_cap=st.sampled_from([0.5, 2.0, 50.0]))
def test_scores_are_capped(target: Target, dtype: torch.dtype, case: Case, soft_cap: float) -> None:
    case = dataclasses.replace(longer(case), dtype=dtype, soft_cap=soft_cap)
    step = Step(case)
    found = step.run(CpuKernels(case.shape, target))
    assert relative_error(found, step.dense()) < TOLERANCES[dtype]


def place(step: Step, seq: int, other: Step, at: int) -> None:
    """Make sequence `at` of `other` the same as sequence `seq` of `step`, in blocks of its own."""
    for mine, its in ((step.keys, other.keys), (step.values, other.values), (step.queries, other.queries)):
        its[at] = mine[seq]


@used_targets
@settings(max_examples=10, deadline=None)
@given(case=cases, dtypes=any_dtypes, data=st.data())
def test_a_row_does_not_depend_on_its_neighbours(
    target: Target, case: Case, dtypes: tuple[torch.dtype, torch.dtype], data: st.DataObject
) -> None:
    """Bit for bit: alone, in any batch, at any place in it."""
    case = of_dtypes(longer(case), dtypes, target)
    step = Step(case)
    kernels = CpuKernels(case.shape, target)
    order = data.draw(st.permutations(range(len(case.lens))))
    batches = [order, *([seq] for seq in order)]
    together = step.run(kernels)
    firsts = np.cumsum([0, *(new for _, new in case.lens)])
    for batch in batches:
        other = Step(dataclasses.replace(case, lens=[case.lens[seq] for seq in batch]))
        for at, seq in enumerate(batch):
            place(step, seq, other, at)
        found = other.run(kernels)
        expected = torch.cat([together[firsts[seq] : firsts[seq + 1]] for seq in batch])
        assert torch.equal(found, expected)


@settings(max_examples=15, deadline=None)
@given(case=cases, dtypes=any_dtypes, num_threads=st.integers(1, 4))
def test_threads_change_nothing(case: Case, dtypes: tuple[torch.dtype, torch.dtype], num_threads: int) -> None:
    case = of_dtypes(longer(case), dtypes)
    expected = Step(case).run(CpuKernels(case.shape))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(Step(case).run(CpuKernels(case.shape)), expected)
    finally:
        torch.set_num_threads(before)


@all_targets
@settings(max_examples=8, deadline=None)
@given(
    case=cases,
    dtypes=any_dtypes,
    prefix_len=st.sampled_from([PARTITION_LEN, 2 * PARTITION_LEN, 2 * PARTITION_LEN + 64]),
    rests=st.lists(st.tuples(st.integers(0, 300), st.sampled_from([1, 1, 1, 9])), min_size=2, max_size=40),
)
def test_a_shared_prefix_changes_nothing(
    target: Target,
    case: Case,
    dtypes: tuple[torch.dtype, torch.dtype],
    prefix_len: int,
    rests: list[tuple[int, int]],
) -> None:
    """Bit for bit: sequences whose tables begin with the same blocks, together and each alone."""
    lens = [(prefix_len + before, new) for before, new in rests]
    case = of_dtypes(dataclasses.replace(case, lens=lens), dtypes, target)
    step = Step(case)
    num_shared = prefix_len // case.block_size
    for seq in range(1, len(rests)):
        step.tables[seq][:num_shared] = step.tables[0][:num_shared]
        step.keys[seq][:prefix_len], step.values[seq][:prefix_len] = (
            step.keys[0][:prefix_len],
            step.values[0][:prefix_len],
        )
    together = step.run(CpuKernels(case.shape, target))
    assert relative_error(together, step.dense()) < TOLERANCES[case.dtype]
    rows = torch.split(together, [new for _, new in case.lens])
    for seq in (0, len(rests) - 1):
        alone = Step(dataclasses.replace(case, lens=[case.lens[seq]]))
        place(step, seq, alone, 0)
        assert torch.equal(alone.run(CpuKernels(case.shape, target)), rows[seq])


@used_targets
@pytest.mark.parametrize("size", [1e-36, 1e-38])
def test_values_near_zero_are_the_same_to_few_rows_and_to_many(target: Target, size: float) -> None:
    """Bit for bit: units for bfloat16 take what is no normal number for 0, so vectors must."""
    step = Step(Case(2, 2, 64, 16, 0, [(PARTITION_LEN, 1)] * 3, 0, torch.bfloat16))
    for seq in range(3):
        step.tables[seq][:-1] = step.tables[0][:-1]
        step.keys[seq][:PARTITION_LEN] = step.keys[0][:PARTITION_LEN]
        step.values[seq] *= size
        step.values[seq][:PARTITION_LEN] = step.values[0][:PARTITION_LEN]
    kernels = CpuKernels(step.case.shape, target)
    together = step.run(kernels)
    for seq in range(3):
        alone = Step(dataclasses.replace(step.case, lens=step.case.lens[:1]))
        place(step, seq, alone, 0)
        assert torch.equal(alone.run(kernels)[0], together[seq])


@used_targets
@settings(max_examples=15, deadline=None)
@given(case=cases, dtypes=any_dtypes, data=st.data())
def test_a_chunked_prompt_is_the_same_prompt(
    target: Target, case: Case, dtypes: tuple[torch.dtype, torch.dtype], data: st.DataObject
) -> None:
    """Bit for bit: a token's sums do not depend on which tokens run beside it, if more than one does."""
    case = of_dtypes(dataclasses.replace(case, lens=[(0, data.draw(st.integers(4, 300)))]), dtypes, target)
    step = Step(case)
    whole = step.run(CpuKernels(case.shape, target))
    before = data.draw(st.integers(0, case.lens[0][1] - 2))
    chunk = Step(dataclasses.replace(case, lens=[(before, case.lens[0][1] - before)]))
    place(step, 0, chunk, 0)
    chunk.queries[0] = step.queries[0][before:]
    assert torch.equal(chunk.run(CpuKernels(case.shape, target)), whole[before:])


@pytest.mark.skipif(AMX not in runnable_targets(), reason="no AMX here")
@settings(max_examples=15, deadline=None)
@given(case=cases, kv_dtype=st.sampled_from([torch.bfloat16, torch.int8]))
def test_tiles_do_what_is_written_out(case: Case, kv_dtype: torch.dtype) -> None:
    """Bit for bit: what is tested where there are none is what runs where there are."""
    case = of_dtypes(longer(case), (torch.bfloat16, kv_dtype))
    assert torch.equal(Step(case).run(CpuKernels(case.shape, AMX)), Step(case).run(CpuKernels(case.shape, TILES)))


@targets
@settings(max_examples=10, deadline=None)
@given(case=cases, dtypes=any_dtypes)
def test_writes_what_the_reference_writes(target: Target, case: Case, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Elements and scales, bit for bit, and no other slot."""
    case = of_dtypes(case, dtypes, target)
    native, reference, kernels = Step(case), Step(case), CpuKernels(case.shape, target)
    native.run(kernels)
    reference.run(ReferenceKernels(torch.device("cpu"), case.shape, kernels.kv_format))
    assert torch.equal(native.layer.keys, reference.layer.keys)
    assert torch.equal(native.layer.values, reference.layer.values)


# A library of float32 beside int8 is for this test alone: one is enough but for long runs.
ROUNDING = [
    *((target, torch.float8_e4m3fn) for target in runnable_targets() if target not in BFLOAT16_ALONE),
    (USED[0], torch.int8),
    *(pytest.param(target, torch.int8, marks=pytest.mark.slow) for target in runnable_targets()[1:]),
]


@pytest.mark.parametrize(("target", "kv_dtype"), ROUNDING, ids=lambda value: str(getattr(value, "name", value)))
def test_rounds_as_torch_does(target: Target, kv_dtype: torch.dtype) -> None:
    """Every float16 of a row whose scale is 1, the halves between two elements included; rows of zeros."""
    largest = LARGEST[kv_dtype]
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    values = values[values.isfinite() & (values.abs() <= largest)].float()
    values = torch.cat((values, torch.zeros(-len(values) % 7)))
    rows = torch.cat((torch.full((len(values) // 7, 1), largest), values.view(-1, 7)), dim=1)
    rows[::1000] = 0.0
    case = Case(1, 1, 8, 16, 0, [(0, len(rows))], 0, torch.float32, kv_dtype)
    kernels, step = CpuKernels(case.shape, target), Step(case)
    step.keys, step.values = [rows[:, None]], [rows[:, None]]
    step.run(kernels)
    kv_format, places = kernels.kv_format, kernels.kv_format.places(step.metadata().slot_mapping)
    for found in (kv_format.read_keys(step.layer.keys), kv_format.read_values(step.layer.values)):
        expected = rows.round() if kv_dtype == torch.int8 else rows.to(kv_dtype).float()
        assert torch.equal(found[places][:, 0], expected)


@all_targets
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [24, 32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_visible(
    target: Target, dtypes: tuple[torch.dtype, torch.dtype], head_dim: int, value: float
) -> None:
    """A broken value, wherever it comes from, reaches the output of whoever sees it, and of nobody else."""
    case = of_dtypes(Case(2, 2, head_dim, 16, 0, [(40, 1), (40, 1), (3, 5)], 5), dtypes, target)
    step = Step(case)
    step.values[0][17, 1, 11] = value
    found = step.run(CpuKernels(case.shape, target))
    assert not found[0, 2:, 11].isfinite().any()
    assert found[0, :2].isfinite().all()
    assert found[1:].isfinite().all()


@all_targets
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [24, 32])
def test_a_key_that_is_no_number_stays_visible(
    target: Target, dtypes: tuple[torch.dtype, torch.dtype], head_dim: int
) -> None:
    """As a value; in a decode and in a prompt."""
    case = of_dtypes(Case(2, 2, head_dim, 16, 0, [(40, 1), (40, 1), (3, 5)], 5), dtypes, target)
    step = Step(case)
    step.keys[0][17, 1, 11] = step.keys[2][1, 1, 3] = float("nan")
    found = step.run(CpuKernels(case.shape, target))
    assert found[[0, *range(2, 7)], 2:].isnan().all()
    assert found[:, :2].isfinite().all()
    assert found[1].isfinite().all()


@settings(max_examples=10, deadline=None)
@given(case=cases)
def test_entries_past_a_sequence_s_blocks_are_never_followed(case: Case) -> None:
    step = Step(case)
    expected = step.run(CpuKernels(case.shape))
    metadata = step.metadata()
    tables = torch.full((len(case.lens), metadata.block_tables.shape[1] + 3), 2**31 - 1, dtype=torch.int32)
    for row, table in zip(tables, step.tables, strict=True):
        row[: len(table)] = torch.tensor(table)
    prepared = CpuKernels(case.shape).prepare(dataclasses.replace(metadata, block_tables=tables))
    found = prepared.attend(torch.cat(step.queries), step.layer, case.sliding_window)
    assert torch.equal(found, expected)


@all_targets
@settings(max_examples=8, deadline=None)
@given(case=cases, dtypes=any_dtypes)
def test_reads_and_writes_nothing_past_its_buffers(
    target: Target, case: Case, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Each buffer ends at a page that faults; the pool's last block belongs to a sequence."""
    case = of_dtypes(case, dtypes, target)
    step = Step(longer(case))
    expected = step.run(CpuKernels(case.shape, target))
    step.layer = LayerKV(guarded(step.layer.keys), guarded(step.layer.values))
    metadata = step.metadata()
    tensors = ("block_tables", "context_lens", "cu_seqlens_q", "slot_mapping")
    metadata = dataclasses.replace(metadata, **{name: guarded(getattr(metadata, name)) for name in tensors})
    prepared = CpuKernels(case.shape, target).prepare(metadata)
    query = write_plain(prepared, guarded(step.heads()), step.layer)
    assert torch.equal(prepared.attend(query, step.layer, case.sliding_window), expected)
    assert torch.equal(prepared.attend(guarded(query), step.layer, case.sliding_window), expected)


copies = st.lists(st.builds(BlockCopy, st.integers(0, 4), st.integers(0, 4), st.integers(1, 16)), max_size=6)


@given(copies, any_dtypes)
def test_copies_what_the_reference_copies(blocks: list[BlockCopy], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    kernels = CpuKernels(AttentionShape(4, 2, 8, 16, 0.5, *dtypes))
    pool = torch.randint(0, 256, (3, 2, 5, 2, kernels.kv_format.head_bytes), dtype=torch.uint8)
    expected = pool.clone()
    ReferenceKernels(torch.device("cpu"), kernels.shape, kernels.kv_format).copy_blocks(expected, blocks)
    kernels.copy_blocks(pool, blocks)
    assert torch.equal(pool, expected)


PLAIN = AttentionShape(4, 2, 8, 16, 0.5, torch.float32, torch.float32)


def test_without_a_compiler_the_reference_serves_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PAGODA_KERNEL_CACHE", str(tmp_path))
    with caplog.at_level(logging.WARNING, "pagoda.kernels"):
        assert isinstance(select_kernels(torch.device("cpu"), PLAIN), ReferenceKernels)
    (record,) = caplog.records
    assert "no g++ here" in record.getMessage()


@pytest.mark.parametrize(
    ("differs", "said"),
    [
        ({"head_dim": 264}, "head_dim 264"),
        ({"head_dim": 9}, "head_dim 9"),
        ({"block_size": 8}, "block_size 8"),
        ({"kv_dtype": torch.float16}, "KV of torch.float16 beside torch.float32"),
    ],
)
def test_what_is_not_covered_goes_to_the_reference_by_name(
    differs: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "pagoda.kernels"):
        kernels = select_kernels(torch.device("cpu"), dataclasses.replace(PLAIN, **differs))
    assert isinstance(kernels, ReferenceKernels)
    assert said in caplog.text


def test_the_native_kernels_are_attached() -> None:
    assert isinstance(select_kernels(torch.device("cpu"), PLAIN), CpuKernels)


def test_every_machine_runs_the_baseline() -> None:
    assert runnable_targets()[-1] is BASELINE
