"""Norms, rotary embedding and KV write in one pass, emulated."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cuda.attention import Backend
from kernels.cuda.variant import Variant
from tests.kernels.cuda import backends, rotations
from tests.kernels.cuda.rotations import EIGHT_BIT_VARIANTS, VARIANTS, Case, cases, each_odd_value
from tests.kernels.cuda.steps import emulated

each_variant = backends.each(VARIANTS)
each_eight_bit_variant = backends.each(EIGHT_BIT_VARIANTS)


@each_variant
@settings(max_examples=8, deadline=None)
@given(case=cases, has_norms=st.booleans())
def test_equals_the_steps_one_by_one(variant: Variant, backend: Backend, case: Case, has_norms: bool) -> None:
    rotations.check_turned(emulated(backend), variant, case, has_norms)


@each_variant
@settings(max_examples=4, deadline=None)
@given(case=cases)
def test_an_angle_of_zero_changes_nothing(variant: Variant, backend: Backend, case: Case) -> None:
    rotations.check_plain(emulated(backend), variant, case)


@each_eight_bit_variant
def test_rounds_as_torch_does(variant: Variant, backend: Backend) -> None:
    rotations.check_rounding(emulated(backend), variant)


@each_eight_bit_variant
@each_odd_value
def test_what_is_not_finite_makes_the_scale_so(variant: Variant, backend: Backend, value: float) -> None:
    rotations.check_not_finite(emulated(backend), variant, value)
