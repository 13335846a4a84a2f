"""Norms, rotary embedding and KV write in one pass, emulated."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cuda.variant import Variant
from tests.kernels.cuda import rotations
from tests.kernels.cuda.rotations import Case, cases, each_eight_bit_variant, each_odd_value, each_variant
from tests.kernels.cuda.steps import EMULATED


@each_variant
@settings(max_examples=8, deadline=None)
@given(case=cases, has_norms=st.booleans())
def test_equals_the_steps_one_by_one(variant: Variant, case: Case, has_norms: bool) -> None:
    rotations.check_turned(EMULATED, variant, case, has_norms)


@each_variant
@settings(max_examples=4, deadline=None)
@given(case=cases)
def test_an_angle_of_zero_changes_nothing(variant: Variant, case: Case) -> None:
    rotations.check_plain(EMULATED, variant, case)


@each_eight_bit_variant
def test_rounds_as_torch_does(variant: Variant) -> None:
    rotations.check_rounding(EMULATED, variant)


@each_eight_bit_variant
@each_odd_value
def test_what_is_not_finite_makes_the_scale_so(variant: Variant, value: float) -> None:
    rotations.check_not_finite(EMULATED, variant, value)
