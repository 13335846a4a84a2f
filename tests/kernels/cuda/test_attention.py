"""The CUDA kernels, emulated, against dense attention in float64, and against themselves in other company."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cuda.attention import Backend
from kernels.cuda.library import AttentionArgs, KernelLibrary
from kernels.cuda.variant import NAMED_VARIANTS, Variant
from tests.kernels.cases import relative_error
from tests.kernels.cuda import backends
from tests.kernels.cuda.backends import each_backend
from tests.kernels.cuda.steps import Case, Step, cases, dense, fill, kernels_of, sharing_cases

TOLERANCES = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-5}
# Where values are scaled, so is each weight before it is rounded: half a unit in the last place there, half one in the
# result, and both may agree throughout a context of one token.
SCALED_TOLERANCES = {dtype: max(bound, torch.finfo(dtype).eps / 2) for dtype, bound in TOLERANCES.items()}

each_variant = backends.each()


@each_variant
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_equals_dense_attention(variant: Variant, backend: Backend, data: st.DataObject) -> None:
    case = data.draw(cases(variant))
    step = Step(case)
    assert relative_error(step.emulate(kernels_of(case, backend)), step.dense()) < tolerance_of(variant)


@each_variant
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_a_sequence_does_not_depend_on_its_neighbours(variant: Variant, backend: Backend, data: st.DataObject) -> None:
    """Bit for bit, alone or among others, whatever order threads and blocks run in."""
    check_alone_and_together(data.draw(cases(variant)), backend)


@each_variant
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_shared_blocks_change_nothing(variant: Variant, backend: Backend, data: st.DataObject) -> None:
    """Bit for bit, in a cluster or alone."""
    case = data.draw(sharing_cases(variant))
    step = check_alone_and_together(case, backend)
    assert relative_error(step.emulate(kernels_of(case, backend)), step.dense()) < tolerance_of(variant)


@each_variant
@pytest.mark.parametrize("seed", range(6))
def test_shared_and_own_parts_may_end_in_any_order(variant: Variant, backend: Backend, seed: int) -> None:
    """Whoever ends a cluster's last part is the last for some of its tokens, and not for others."""
    lens, window = [(97, 1), (100, 1), (110, 1)], 200 if variant.has_window else 0
    step = Step(Case(variant, 2, 2, window, lens, seed, order_seed=seed + 1, prefix_blocks=(0, 2, 2)))
    assert relative_error(step.emulate(kernels_of(step.case, backend)), step.dense()) < tolerance_of(variant)


def tolerance_of(variant: Variant) -> float:
    return (TOLERANCES if variant.kv_dtype is None else SCALED_TOLERANCES)[variant.dtype]


def check_alone_and_together(case: Case, backend: Backend) -> Step:
    step, kernels = Step(case), kernels_of(case, backend)
    together = step.emulate(kernels)
    first = 0
    for i, (_, new) in enumerate(case.lens):
        assert torch.equal(step.alone(i).emulate(kernels), together[first : first + new])
        first += new
    other_order = Step(dataclasses.replace(case, order_seed=case.order_seed + 1))
    assert torch.equal(other_order.emulate(kernels_of(case, backend)), together)
    return step


@backends.each([variant for variant in NAMED_VARIANTS if variant.kv_dtype is not None])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("is_key", [True, False])
def test_what_is_not_finite_stays_visible(variant: Variant, backend: Backend, value: float, is_key: bool) -> None:
    """With scales: to whoever sees the token, in a decode's context or in a chunk itself, and to nobody else."""
    step = Step(Case(variant, 2, 2, 100 if variant.has_window else 0, [(40, 1), (40, 1), (3, 20)], 5, 1))
    for sequence, before in ((step.sequences[0], 40), (step.sequences[2], 3)):
        (sequence.keys if is_key else sequence.values)[17, 1, 11] = value
        fill(step.layer, step.case.kv_format, sequence, before)
    found = step.emulate(kernels_of(step.case, backend))
    decode, other, chunk = torch.split(found.isfinite(), [1, 1, 20])
    assert not decode[:, 2:].any()
    assert not chunk[17 - 3 :, 2:].any()
    assert decode[:, :2].all()
    assert other.all()
    assert chunk[: 17 - 3].all()
    assert chunk[:, :2].all()


@each_backend
@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=4, max_size=4), st.integers(0, 18), st.integers(0, 2**32 - 1))
def test_a_captured_step_takes_other_lengths_and_tables(
    backend: Backend, context_lens: list[int], prefix_blocks: int, seed: int
) -> None:
    """The very arguments of the first launch, work and tables overwritten in place, attend to what is there now."""
    variant = Variant(torch.bfloat16, 128, 16)
    longest = Case(variant, 2, 4, 0, [(299, 1)] * 4, seed, 0, prefix_blocks=(0, 0, 0, 0))
    step, kernels = Step(longest), kernels_of(longest, backend)
    metadata = step.metadata()
    attention = kernels.prepare_captured(metadata, 300)
    launched: list[AttentionArgs] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelLibrary, "attend", lambda self, args: launched.append(args))
        query = torch.cat([sequence.query for sequence in step.sequences])
        out = attention.attend(query, step.layer, 0)

    other = Step(dataclasses.replace(longest, prefix_blocks=(0, *[prefix_blocks] * 3)))
    for sequence in other.sequences:
        fill(step.layer, longest.kv_format, sequence, 300)
    sequences = [
        dataclasses.replace(other_one, keys=other_one.keys[:length], values=other_one.values[:length], query=one.query)
        for one, other_one, length in zip(step.sequences, other.sequences, context_lens, strict=True)
    ]
    tables = other.metadata().host_block_tables
    metadata.context_lens.copy_(torch.tensor(context_lens))
    metadata.block_tables.copy_(torch.from_numpy(tables))
    attention.refresh(attention.cut(np.array(context_lens, np.int64), tables))
    kernels.library(has_window=False).attend(launched[0])
    expected = torch.cat([dense(sequence, longest) for sequence in sequences])
    assert relative_error(out, expected) < tolerance_of(variant)
