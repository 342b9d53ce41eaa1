"""The scalar-sized objects: coefficients of 12 bits, and what counts as a change."""

import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezo_lightning.steps import GradientEstimate, Point, Step, round_coefficient, round_fp32

FINITE = st.floats(min_value=-(2.0**99), max_value=2.0**99, allow_nan=False)


@settings(derandomize=True, max_examples=500, deadline=None)
@given(value=FINITE)
def test_a_coefficient_has_12_bits_and_is_near(value: float):
    rounded = round_coefficient(value)
    if abs(value) < 2.0**-101:
        assert rounded == 0
        return
    mantissa = math.frexp(rounded)[0] * 2**12
    assert mantissa == int(mantissa)
    assert rounded == round_fp32(rounded)
    assert round_coefficient(rounded) == rounded
    assert round_coefficient(-value) == -rounded
    if abs(value) >= 2.0**-100:
        assert abs(rounded - value) <= abs(value) * 2.0**-12  # half of the last of 12 bits, at the least mantissa


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 2.0**100, -(2.0**120)])
def test_what_is_no_coefficient_is_refused(value: float):
    with pytest.raises(ValueError, match="is not a finite number below"):
        round_coefficient(value)


@pytest.mark.parametrize("value", [0.0, 1e-40, -1e-300, 5e-324])
def test_tiny_coefficients_become_zero(value: float):
    assert round_coefficient(value) == 0.0


@settings(derandomize=True, max_examples=200, deadline=None)
@given(value=st.floats(width=32, allow_nan=False))
def test_round_fp32_keeps_fp32_numbers(value: float):
    assert struct.pack("<d", round_fp32(value)) == struct.pack("<d", value)


def test_a_point_rounds_its_coefficients_and_drops_zeros():
    point = Point(((3, 1e-3), (4, 0.0), (5, 1e-40)), label="here")
    assert point.terms == ((3, round_coefficient(1e-3)),)
    assert point == Point(((3, 1e-3),), label="elsewhere")
    assert Point().terms == ()


def test_an_estimate_has_a_projected_grad_for_every_seed():
    with pytest.raises(AssertionError):
        GradientEstimate((1, 2), (0.5,))


@pytest.mark.parametrize(
    ("step", "nothing"),
    [
        (Step(), True),
        (Step(((1, (0.0, 0.0)),), (0.0, 0.0)), True),
        (Step(((1, (0.0, 0.0)),), (0.0, 0.5)), False),
        (Step(((1, (0.0, 0.25)),), (0.0, 0.0)), False),
        (Step(((1, (0.0,)), (2, (0.25,))), (0.0,)), False),
    ],
)
def test_a_step_knows_whether_it_changes_anything(step: Step, nothing: bool):
    assert step.changes_nothing is nothing
