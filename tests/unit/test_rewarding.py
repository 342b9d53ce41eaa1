"""Calling rewards: what is passed, what is accepted, and that a failure never becomes a number."""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from mezo_lightning.data.batch import Batch
from mezo_lightning.rewarding.rewards import Rewards
from rewards.rouge import Rouge
from rewards.squad import f1

BATCH = Batch(
    index=(7, 8, 9),
    prompts=("p0", "p1", "p2"),
    targets=None,
    options=None,
    answers=None,
    columns={"answers": (["red"], ["blue"], ["a big dog"]), "kind": ("x", "y", "z")},
)
SAID = ("red", "red", "dog")


def returning(value: Any) -> Callable[..., Any]:
    def reward(completions: list[str]) -> Any:
        return value

    return reward


def first_row_is(value: Any) -> Callable[..., Any]:
    return returning([value, 0.5, 1.0])


def test_values_names_and_weights() -> None:
    rewards = Rewards(["rewards.squad.f1", f1, Rouge(references="kind"), functools.partial(f1)], [1, 0.5, 0, 2])
    assert rewards.names == ("f1", "f1_2", "Rouge", "f1_3")
    assert rewards.weights == (1.0, 0.5, 0.0, 2.0)
    result = rewards(BATCH, SAID)
    assert result.values.dtype == torch.float64
    assert result.values[:, 0].tolist() == pytest.approx([1.0, 0.0, 2 / 3])
    assert result.values.shape == (3, 4)
    assert not result.failed.any()


def test_a_reward_is_told_what_it_accepts_as_lists() -> None:
    seen: dict[str, Any] = {}

    def named(completions: list[str], kind: list[str], absent: int = 3) -> list[float]:
        seen["named"] = (completions, kind, absent)
        return [1.0] * len(completions)

    def everything(**columns: Any) -> list[float]:
        seen["all"] = columns
        return [1.0] * len(columns["completions"])

    Rewards([named, everything])(BATCH, SAID, completion_ids=[[1], [2], [3]])
    assert seen["named"] == (["red", "red", "dog"], ["x", "y", "z"], 3)
    trl = {"trainer_state", "log_extra", "log_metric"}
    assert set(seen["all"]) == {"prompts", "completions", "completion_ids", "answers", "kind", *trl}
    assert all(isinstance(value, list) for name, value in seen["all"].items() if name not in trl)


@pytest.mark.parametrize(
    "result",
    [
        [1, True, 0.5],
        (1.0, 1.0, 0.5),
        np.array([1, 1, 0.5], dtype=np.float32),
        torch.tensor([1, 1, 0.5], dtype=torch.bfloat16),
        [np.float32(1), np.bool_(True), torch.tensor(0.5)],
    ],
)
def test_any_kind_of_numbers_is_accepted(result: Any) -> None:
    assert Rewards(returning(result))(BATCH, SAID).values[:, 0].tolist() == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("on_failure", ["raise", "mask"])
def test_none_leaves_out_the_component_and_not_the_sample(on_failure: Any) -> None:
    result = Rewards([first_row_is(None), f1], on_failure=on_failure)(BATCH, SAID)
    assert math.isnan(result.values[0, 0])
    assert result.values[0, 1] == 1.0
    assert not result.failed.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan"), 10**400])
def test_a_value_that_is_not_finite_raises_or_masks_the_whole_sample(bad: Any) -> None:
    with pytest.raises(
        ValueError, match=r"Reward reward returned (nan|-?inf) for row 7 \(prompt 'p0', completion 'red'"
    ):
        Rewards(first_row_is(bad))(BATCH, SAID)
    result = Rewards([first_row_is(bad), f1], on_failure="mask")(BATCH, SAID)
    assert result.failed.tolist() == [True, False, False]
    assert result.values.isnan().tolist() == [[True, True], [False, False], [False, False]]


def test_an_exception_raises_with_its_cause_or_masks_every_sample(caplog: pytest.LogCaptureFixture) -> None:
    def broken(completions: list[str]) -> list[float]:
        raise OSError("the judge is down")

    with pytest.raises(
        RuntimeError, match=r"broken failed for row 7 .* and 2 more rows: OSError: the judge is down"
    ) as caught:
        Rewards(broken)(BATCH, SAID)
    assert isinstance(caught.value.__cause__, OSError)
    rewards = Rewards([broken, f1], on_failure="mask")
    with caplog.at_level(logging.WARNING):
        results = [rewards(BATCH, SAID) for _ in range(3)]
    assert results[-1].failed.all()
    assert results[-1].values.isnan().all()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1, "the same failure is said once, then counted"
    assert "broken failed for row 7" in said[0]
    assert "OSError: the judge is down" in said[0]


def test_ctrl_c_is_not_a_failed_reward() -> None:
    def interrupted(completions: list[str]) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Rewards(interrupted, on_failure="mask")(BATCH, SAID)


@pytest.mark.parametrize("on_failure", ["raise", "mask"])
@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0], "returned 2 values for 3 rows"),
        ([[1.0, 2.0, 3.0]], "returned 1 values for 3 rows"),
        ("high", "returned 'high', and should return a list"),
        (1.0, r"returned 1\.0, and should return a list"),
        (None, "returned None, and should return a list"),
        (torch.tensor(1.0), r"returned 1\.0, and should return a list"),
        ([1.0, "0.5", 1.0], r"returned '0\.5' for row 8"),
        ([1.0, [0.5], 1.0], r"returned \[0\.5\] for row 8"),
        ([1.0, {"points": 1}, 1.0], "for row 8"),
        (torch.ones(3, 1), "for row 7"),
    ],
)
def test_a_misconfigured_reward_always_raises(result: Any, message: str, on_failure: Any) -> None:
    with pytest.raises(ValueError, match=message):
        Rewards(returning(result), on_failure=on_failure)(BATCH, SAID)


def test_missing_columns_are_found_before_any_call() -> None:
    rewards = Rewards([f1, Rouge(references="summary")])
    rewards.check(["answers", "summary"])
    with pytest.raises(ValueError, match="Reward f1 needs the column 'answers'; the data has: kind, summary"):
        rewards.check(["kind", "summary"])
    with pytest.raises(ValueError, match="Reward Rouge needs the column 'summary'; the data has: answers"):
        rewards.check(["answers"])
    with pytest.raises(ValueError, match=r"column 'prompts' has the name of an argument"):
        rewards.check(["answers", "summary", "prompts"])


def test_startup_finds_what_never_works_whatever_the_policy() -> None:
    Rewards(f1, on_failure="mask").startup(BATCH, SAID)
    Rewards(first_row_is(None), on_failure="mask").startup(BATCH, SAID)
    some = Rewards(first_row_is(math.nan), on_failure="mask").startup(BATCH, SAID)
    assert some.failed.tolist() == [True, False, False]
    with pytest.raises(ValueError, match="returned nan"):
        Rewards(first_row_is(math.nan)).startup(BATCH, SAID)
    with pytest.raises(ValueError, match=r"returned nan for row 7 .* and 2 more rows"):
        Rewards(returning([math.nan] * 3), on_failure="mask").startup(BATCH, SAID)
    with pytest.raises(ValueError, match="no opinion on any of the first 3 rows"):
        Rewards([returning([None] * 3), returning((None,) * 3)]).startup(BATCH, SAID)


async def asynchronous(completions: list[str]) -> list[float]:
    return [1.0]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ([], "at least one"),
        ("rewards.squad.nonsense", r"write the import path of a function"),
        ("nonsense", "write the import path"),
        ("no_such_module.f1", "No module named 'no_such_module'. Is it installed"),
        ("rewards.squad.string", "cannot be called"),
        ("rewards.rouge.Rouge", "Reward Rouge is a class: give an instance"),
        (lambda completions: asynchronous(completions), "lambda is async"),
        ([3], "neither a function nor an import path"),
        (lambda a, /: [1.0], "positional-only"),
    ],
)
def test_what_cannot_be_a_reward_is_refused(reward: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rewards(reward)(BATCH, SAID)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [1.0, math.nan]])
def test_weights_must_fit(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="reward_weights"):
        Rewards([f1, f1], weights)


@pytest.mark.parametrize("patience", [-1.0, math.nan, math.inf])
def test_patience_must_be_a_time(patience: float) -> None:
    with pytest.raises(ValueError, match="patience="):
        Rewards(f1, patience=patience)


def test_on_failure_must_be_known() -> None:
    with pytest.raises(ValueError, match="on_failure='skip'"):
        Rewards(f1, on_failure="skip")  # pyright: ignore[reportArgumentType]
