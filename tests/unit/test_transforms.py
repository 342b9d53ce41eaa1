import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mezo_lightning.steps import GradientEstimate
from mezo_lightning.transforms import Chain, Clip, Identity, Sign, Standardize, Transform

GRADS = st.lists(st.floats(-1e6, 1e6), max_size=6).map(tuple)
TRANSFORMS: list[Transform] = [Identity(), Clip(2.0), Standardize(), Sign(), Chain([Clip(1.0), Sign()])]


def test_each_on_one_example():
    grads = (3.0, -4.0, 0.0)
    assert Identity().scalars(grads) == grads
    assert Clip(3.5).scalars(grads) == (3.0, -3.5, 0.0)
    assert Sign().scalars(grads) == (1.0, -1.0, 0.0)
    assert Standardize().scalars(grads) == pytest.approx([g / math.sqrt(25 / 3) for g in grads])
    assert Standardize().scalars((-7.0,)) == (-1.0,)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(grads=GRADS)
def test_signs_and_counts_are_kept(grads: tuple[float, ...]):
    for transform in TRANSFORMS:
        result = transform.scalars(grads)
        assert len(result) == len(grads)
        assert all(math.isfinite(r) and r * g >= 0 for r, g in zip(result, grads, strict=True))


@settings(derandomize=True, max_examples=100, deadline=None)
@given(grads=st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=6).map(tuple), scale=st.floats(1e-3, 1e3))
def test_standardize_forgets_the_scale(grads: tuple[float, ...], scale: float):
    first, second = (Standardize().scalars(tuple(g * s for g in grads)) for s in (1.0, scale))
    assert first == pytest.approx(second)
    assert math.sqrt(sum(g * g for g in first) / len(first)) == pytest.approx(1.0)


def test_standardize_leaves_zeros_alone():
    assert Standardize().scalars((0.0, 0.0)) == (0.0, 0.0)
    assert Standardize().scalars(()) == ()


def test_a_chain_applies_the_first_one_first():
    assert Chain([Clip(1.0), Standardize()]).scalars((5.0, -0.5)) == pytest.approx(Standardize().scalars((1.0, -0.5)))
    assert Chain([Standardize(), Clip(1.0)]).scalars((5.0, -0.5)) != Chain([Clip(1.0), Standardize()]).scalars(
        (5.0, -0.5)
    )
    assert Chain([]).scalars((5.0,)) == (5.0,)


def test_the_rest_of_an_estimate_is_kept_and_a_skipped_one_stays_skipped():
    estimate = GradientEstimate((1, 2), (3.0, -4.0), 0.5, pairs=((0, 1), (2, 3)))
    changed = Sign()(estimate)
    assert (changed.seeds, changed.projected_grads, changed.scale) == ((1, 2), (1.0, -1.0), 0.5)
    assert changed.pairs == estimate.pairs
    for transform in TRANSFORMS:
        assert transform(GradientEstimate(skipped="why")) == GradientEstimate(skipped="why")


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
def test_a_limit_must_be_positive(limit: float):
    with pytest.raises(ValueError, match=r"limit=.* must be positive"):
        Clip(limit)
