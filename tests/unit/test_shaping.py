"""Terms on the shape of a completion, and wrappers around other rewards."""

import asyncio
import math
from typing import Any

import numpy as np
import pytest
import torch

from mezo_lightning.data.batch import Batch
from mezo_lightning.rewarding.arguments import Rows
from mezo_lightning.rewarding.functions import named_rewards
from rewards.shaping import Clip, FormatGate, LengthPenalty, RepetitionPenalty, Scale, SoftOverlong

DOWN = OSError("the judge is down")


def test_length_penalty():
    assert LengthPenalty(per_word=0.1, free=2)(["a b", "a b c d", "", "a " * 100]) == [0.0, -0.2, 0.0, -1.0]


def test_soft_overlong_is_dapos_equation_13():
    lengths = [0, 60, 80, 90, 100, 101, 500]
    penalties = SoftOverlong(limit=100, margin=20)([[1] * length for length in lengths])
    assert penalties == [0.0, 0.0, 0.0, -0.5, -1.0, -1.0, -1.0]


def test_soft_overlong_agrees_with_trl():
    trl = pytest.importorskip("trl.rewards", reason="TRL is not installed")
    ids = [[1] * length for length in range(40)]
    assert SoftOverlong(30, 7)(ids) == pytest.approx(trl.get_soft_overlong_punishment(30, 7)(ids))


def test_repetition_penalty():
    texts = ["a b c d", "go go go go go", "Go go", "", "a b a b"]
    assert RepetitionPenalty(size=2)(texts) == pytest.approx([0.0, -0.75, 0.0, 0.0, -1 / 3])
    assert RepetitionPenalty(size=1, weight=2.0)(["x x x x"]) == [-1.5]


def gated(reward: Any) -> FormatGate:
    return FormatGate(reward, pattern="x")


def returning(value: Any) -> Any:
    def reward(completions: list[str]) -> Any:
        return value

    return reward


@pytest.mark.parametrize("values", [[0.0, 2.0, -3.0], np.array([0.0, 2.0, -3.0]), torch.tensor([0.0, 2.0, -3.0])])
def test_clip_and_scale(values: Any):
    assert Clip(returning(values), low=-1, high=1)(completions=["a"] * 3) == [0.0, 1.0, -1.0]
    assert Scale(returning(values), factor=-2.0, offset=1.0)(completions=["a"] * 3) == [1.0, -3.0, 7.0]
    assert Clip(Scale(returning(values), 10.0), high=5.0)(completions=["a"] * 3) == [0.0, 5.0, -30.0]


def test_nothing_becomes_a_number_that_was_none():
    values = [None, DOWN, math.nan, -math.inf, 0.5]
    for wrap in (lambda reward: Clip(reward, 0.0, 1.0), lambda reward: Scale(reward, 2.0), gated):
        said = wrap(returning(values))(completions=["y"] * 5)
        assert said[:2] == [None, DOWN]
        assert math.isnan(said[2])
        assert said[3] == -math.inf, "a failure is not to be clipped into a value"
        assert math.isfinite(said[4])


def test_wrappers_keep_the_convention_of_what_they_wrap():
    def verl(solution_str: str, ground_truth: str) -> dict[str, Any]:
        return {"score": 3.0, "acc": solution_str == ground_truth}

    def nemo(ground_truth: str, response: str) -> tuple[float, bool]:
        return 3.0, True

    def scale(model_output: str, ground_truth: str) -> tuple[str, float]:
        return "correct", 3.0

    def openrlhf(queries: list[str], labels: list[str]) -> dict[str, Any]:
        return {"rewards": torch.tensor([3.0]), "extra_logs": {"n": torch.tensor([5.0])}}

    async def later(completions: list[str], ground_truth: list[str]) -> list[float]:
        return [3.0] * len(completions)

    columns = {"ground_truth": ("a", "b"), "label": ("c", "d")}
    rows = Rows(Batch((0, 1), ("", ""), None, None, None, columns), ("a", "x"))
    for function, convention in ((verl, "verl"), (nemo, "es"), (scale, "es"), (openrlhf, "openrlhf"), (later, "trl")):
        [reward] = named_rewards([Clip(function, high=1.0)])
        reward.check(columns)
        assert (reward.name, reward.convention.name) == (function.__name__, convention)
        results = [reward.function(**call) for call in reward.calls(rows)]
        results = [asyncio.run(result) for result in results] if reward.is_async else results
        answers = reward.values(results, rows)
        assert answers.values == [1.0, 1.0], function
        if function is verl:
            assert answers.notes == {"acc": [1.0, 0.0]}, "only the reward is changed"


def test_what_a_reward_says_of_itself_is_said_by_its_wrapper():
    class Judge:
        remote = per_sample = True
        required_columns = ("gold",)

        def __call__(self, completions: list[str], **columns: Any) -> list[float]:
            return [1.0]

    [reward] = named_rewards([Scale(Clip(Judge()), 2.0)])
    assert (reward.name, reward.remote, reward.per_sample) == ("Judge", True, True)
    with pytest.raises(ValueError, match="needs the column 'gold'"):
        reward.check([])


def test_the_format_gate_looks_at_the_completion():
    gate = FormatGate("rewards.squad.f1", pattern="<answer>.*</answer>", otherwise=-1.0)
    texts = ["<answer>red\n</answer> ", "red"]
    assert gate(completions=texts, answers=["answer red answer"] * 2)[1] == -1.0
    assert gate(completions=texts, answers=["answer red answer"] * 2)[0] > 0.0
    chat = [[{"role": "assistant", "content": text}] for text in texts]
    assert FormatGate(returning([1.0, 1.0]), pattern="<answer>.*</answer>")(completions=chat) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([torch.tensor(1.0), torch.tensor(1.0)], [0.0, 1.0]),
        ([np.float32(1.0), np.float32(1.0)], [0.0, 1.0]),
        ([{"score": 1.0, "n": 3}, ("label", 1.0)], [{"score": 0.0, "n": 3}, ("label", 1.0)]),
        ([("label", 1.0), {"score": 1.0}], [("label", 0.0), {"score": 1.0}]),
        ({"rewards": [1.0, 1.0], "n": [3, 3]}, {"rewards": [0.0, 1.0], "n": [3, 3]}),
        ([DOWN, None], [DOWN, None]),
        ([None, 1.0], [None, 1.0]),
    ],
)
def test_a_gate_stands_before_values_of_every_form(values: Any, expected: Any):
    assert gated(returning(values))(completions=["wrong", "x"]) == expected


def test_terms_are_rewards():
    rows = Rows(Batch((0,), ("",), None, None, None, {}), ("a b",), [[1, 2]])
    for term in (LengthPenalty(), SoftOverlong(2, 1), RepetitionPenalty()):
        [reward] = named_rewards([term])
        assert (reward.per_sample, reward.remote) == (True, False)
        [call] = reward.calls(rows)
        assert len(reward.values([reward.function(**call)], rows).values) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LengthPenalty(free=-1), "free=-1"),
        (lambda: LengthPenalty(per_word=math.inf), "per_word=inf"),
        (lambda: SoftOverlong(limit=10, margin=11), "margin=11"),
        (lambda: RepetitionPenalty(size=0), "size=0"),
        (lambda: Clip("rewards.squad.f1", low=1.0, high=0.0), r"low=1\.0"),
        (lambda: Scale("rewards.squad.f1", factor=math.nan), "factor=nan"),
        (lambda: Scale("rewards.squad.nonsense"), "no attribute 'nonsense'"),
        (lambda: Clip("rewards.text.Matches"), "is no function and no callable object"),
        (lambda: FormatGate("rewards.squad.f1", pattern="("), "is no regular expression"),
        (lambda: FormatGate(SoftOverlong(2, 1), pattern="a"), "takes no `completions`"),
    ],
)
def test_settings_that_cannot_be(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()
