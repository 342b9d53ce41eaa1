"""Scores turned into comparisons."""

import math
from typing import Any

import pytest

from mezo_lightning.rewarding.oracles import Oracle
from rewards.metrics import TorchMetric
from rewards.pairwise import ByScore


def length(completions):
    return [float(len(text)) if text else None for text in completions]


def gold(prompts, completions, answers, **columns):
    return [float(a == c) for a, c in zip(answers, completions, strict=True)]


def fails(completions):
    return [OSError("gone") if text == "x" else math.nan if text == "y" else 1.0 for text in completions]


async def later(completions):
    return [0.0 for _ in completions]


def test_the_higher_score_wins():
    oracle = ByScore(length)
    assert oracle(["p"] * 4, ["aa", "a", "a", ""], ["a", "aa", "b", "a"]) == [1.0, -1.0, 0.0, None]
    assert oracle([], [], []) == []


def test_a_scale_makes_it_a_probability():
    [answer] = ByScore(length, scale=2.0)(["p"], ["aaaa"], ["a"])
    probability = 1 / (1 + math.exp(-3 / 2.0))
    assert answer == pytest.approx(2 * probability - 1)


def test_columns_belong_to_both():
    oracle = ByScore(gold)
    assert oracle(["p", "q"], ["a", "a"], ["b", "b"], answers=["a", "b"], log_metric=print) == [1.0, -1.0]
    assert oracle.required_columns == ("answers",)
    assert ByScore(length).required_columns == ()
    assert ByScore(TorchMetric("torchmetrics.text.CHRFScore", "summary")).required_columns == ("summary",)
    with pytest.raises(ValueError, match="needs the column 'answers'"):
        Oracle(oracle).check(["question"])


def test_failures_stay_failures():
    failed, nan = ByScore(fails)(["p", "p"], ["a", "y"], ["x", "a"])
    assert isinstance(failed, OSError)
    assert isinstance(nan, float)
    assert math.isnan(nan)


def test_an_import_path_will_do():
    oracle = ByScore("rewards.squad.f1")
    assert oracle(["p"], ["the mill"], ["zqx"], answers=["mill"]) == [1.0]
    assert not oracle.per_sample
    assert oracle.identity != ByScore("rewards.squad.exact_match").identity


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward": "no.such.reward"}, "no such function"),
        ({"reward": length, "scale": 0.0}, r"scale=0\.0"),
        ({"reward": 3}, "cannot be called"),
        ({"reward": later}, "is async"),
    ],
)
def test_what_cannot_work_is_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        ByScore(**arguments)
