"""The CUDA kernels, emulated, against dense attention in float64, and against themselves in other company."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cuda.variant import NAMED_VARIANTS, Variant
from tests.kernels.cuda.steps import Step, cases, emulated_kernels, relative_error

TOLERANCES = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-5}

each_variant = pytest.mark.parametrize("variant", NAMED_VARIANTS, ids=lambda variant: variant.name)


@each_variant
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_equals_dense_attention(variant: Variant, data: st.DataObject) -> None:
    step = Step(data.draw(cases(variant)))
    error = relative_error(step.emulate(), step.dense())
    assert error < TOLERANCES[variant.dtype]


@each_variant
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_a_sequence_does_not_depend_on_its_neighbours(variant: Variant, data: st.DataObject) -> None:
    """Bit for bit, alone or among others, whatever order threads and blocks run in."""
    case = data.draw(cases(variant))
    step, kernels = Step(case), emulated_kernels(case)
    together = step.emulate(kernels)
    first = 0
    for i, (_, new) in enumerate(case.lens):
        assert torch.equal(step.alone(i).emulate(kernels), together[first : first + new])
        first += new
    other_order = Step(dataclasses.replace(case, order_seed=case.order_seed + 1))
    assert torch.equal(other_order.emulate(), together)
