"""Which convention a function follows, what it is told, and what may be made of its answers.

The functions below have the signatures of other projects' own ones, named above each.
"""

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch

from mezo_lightning.data.batch import Batch
from mezo_lightning.rewarding.arguments import Rows
from mezo_lightning.rewarding.conventions import CONVENTIONS
from mezo_lightning.rewarding.functions import NamedReward, named_rewards
from mezo_lightning.rewarding.rewards import Rewards
from mezo_lightning.rewarding.settings import ConventionName, Reward

COLUMNS = {
    "answer": ("4", "blue"),
    "ground_truth": ("four", "blau"),
    "reference": ("r0", "r1"),
    "test_cases": ("t0", "t1"),
    "labels": ("l0", "l1"),
    "solution": ("s0", "s1"),
    "action": ("a0", "a1"),
    "observation": ("o0", "o1"),
}
BATCH = Batch((7, 8), ("2+2=", "sky: "), None, None, None, COLUMNS)
ROWS = Rows(BATCH, ("4", "red"), [[1], [2, 3]])


def rows_with(**columns: tuple[Any, Any]) -> Rows:
    return Rows(Batch((7, 8), ("2+2=", "sky: "), None, None, None, columns), ("4", "red"), [[1], [2, 3]])


def named(function: Any, **settings: Any) -> NamedReward:
    [reward] = named_rewards([Reward(function, **settings)])
    return reward


def with_signature(text: str) -> Callable[..., Any]:
    """A function of these parameters that returns them."""
    space: dict[str, Any] = {}
    exec(f"def reward({text}): return dict(locals())", space)
    return space["reward"]


SIGNATURES = [
    # TRL: accuracy, format, overlong and repetition, cosine, documentation
    ("completions, solution, log_extra=None, **kwargs", "trl"),
    ("completions, **kwargs", "trl"),
    ("completion_ids, **kwargs", "trl"),
    ("completions, solution, completion_ids, **kwargs", "trl"),
    ("prompts, completions, completion_ids, trainer_state, **kwargs", "trl"),
    ("prompts, completions, answer", "trl"),
    ("completions, answer, log_metric, environments=None", "trl"),
    ("completions, action, observation", "trl"),
    ("**kwargs", "trl"),
    # verl: default, gsm8k, math, a reward model's router, batch
    ("data_source, solution_str, ground_truth, extra_info=None, **kwargs", "verl"),
    ("solution_str, ground_truth, method='strict', format_score=0.0, score=1.0", "verl"),
    ("solution_str, ground_truth", "verl"),
    ("data_sources, solution_strs, ground_truths, extra_infos, **kwargs", "verl_batch"),
    # verl's prime_code, prime_math and geo3k, which its managers call by position
    ("completion, test_cases, continuous=False", "verifiers"),
    ("model_output, ground_truth", "es"),
    ("predict_str, ground_truth, use_boxed=True, format_score=0.1", "es"),
    # OpenRLHF
    ("queries, prompts, labels", "openrlhf"),
    ("queries, prompts, labels, **kwargs", "openrlhf"),
    # NeMo-RL
    ("ground_truth, response", "es"),
    ("ground_truth, response, think_tag='think', answer_tag='answer'", "es"),
    # verifiers
    ("completion, answer, **kwargs", "verifiers"),
    ("prompt, completion, answer, state", "verifiers"),
    ("completion, info, task", "verifiers"),
    # es-at-scale
    ("model_output, answer, fast=False", "es"),
]


@pytest.mark.parametrize(("signature", "convention"), SIGNATURES)
def test_the_convention_is_recognised(signature: str, convention: str):
    reward = named(with_signature(signature))
    reward.check(COLUMNS)
    assert reward.convention.name == convention
    calls = reward.calls(Rows(BATCH, ("4", "red"), [[1], [2, 3]], extras={"trainer_state": 1, "log_metric": print}))
    assert len(calls) == (1 if convention in ("trl", "verl_batch") else 2)
    for call in calls:
        inspect.signature(reward.function).bind(**call)  # nothing is missing and nothing unknown is passed
    assert reward.per_sample == (convention not in ("trl", "verl_batch"))


@pytest.mark.parametrize(
    ("signature", "candidates"),
    [
        ("completions, answers, states", "trl and verifiers_group"),
        ("completions, infos", "trl and verifiers_group"),
        ("completions, tasks, **kwargs", "trl and verifiers_group"),
        ("completion, completions", "trl and verifiers"),
        ("completion, solution_str", "verl and verifiers"),
        ("solution_str, solution_strs", "verl_batch and verl"),
        ("queries, completions", "openrlhf and trl"),
        ("completion, trace", "a method of a verifiers task .* and verifiers"),
        ("task, completion, reference, extra_info", "verifiers and prime"),
    ],
)
def test_two_matches_are_an_error_that_names_them(signature: str, candidates: str):
    with pytest.raises(ValueError, match=f"which fits {candidates}: set convention"):
        named(with_signature(signature))


@pytest.mark.parametrize(
    ("signature", "message"),
    [
        ("query, prompt, label", r"'label', 'prompt', 'query'.*columns.*convention to one of trl, verl"),
        ("text", "takes 'text', from which no convention can be recognised"),
        ("", "takes no argument"),
        ("self, trace", "method of a verifiers task.*set convention"),
        ("task, trace, runtime", "method of a verifiers task"),
        ("completions, environments", "environment of several turns.*'environments'"),
        ("observation, action, label, **kwargs", "environment of several turns.*'action', 'observation'"),
    ],
)
def test_no_match_is_an_error_that_says_what_there_is(signature: str, message: str):
    with pytest.raises(ValueError, match=message):
        named(with_signature(signature))


def test_a_method_of_a_verifiers_task_is_adapted_as_the_page_says(monkeypatch: pytest.MonkeyPatch):
    class Exact:
        def __init__(self, data: SimpleNamespace):
            self.data = data

        async def exact_match(self, trace: SimpleNamespace) -> float:
            return float(trace.last_reply == self.data.answer)

    page = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text()
    [block] = re.findall(r"```python\n(.*?my_environment.*?)```", page, re.DOTALL)
    monkeypatch.setitem(sys.modules, "my_environment", SimpleNamespace(Exact=Exact, ExactData=SimpleNamespace))
    names: dict[str, Any] = {}
    exec(block, names)
    with pytest.raises(ValueError, match=r"calls the method with SimpleNamespace\(last_reply=completion\)"):
        NamedReward("exact_match", Exact(SimpleNamespace()).exact_match)
    rows = rows_with(answer=("4", "blue"))
    assert Rewards(names["exact"])(rows.batch, rows.completions).values[:, 0].tolist() == [1.0, 0.0]


class AgentInstance:
    """OpenRLHF's."""

    async def reset(self, states: dict) -> dict:
        return states

    async def step(self, states: dict) -> dict:
        return states


class MathEnvironment:
    """NeMo-RL's EnvironmentInterface."""

    def step(self, message_log_batch: list, metadata: list) -> None: ...

    def __call__(self, completions: list) -> list:
        return completions


@pytest.mark.parametrize("reward", [AgentInstance, MathEnvironment()])
def test_environments_of_several_turns_are_refused_by_name(reward: Any):
    with pytest.raises(ValueError, match=rf"({type(reward).__name__}|AgentInstance).*several turns.*method `step`"):
        named(reward)


@pytest.mark.parametrize(
    ("signature", "columns", "message"),
    [
        ("completions, gold", ("answer", "kind"), "needs the column 'gold'; the data has: answer, kind"),
        ("solution_str, ground_truth", ("answer",), "needs the column 'ground_truth'"),
        ("solution_str, ground_truth, reward_router_address", ("ground_truth",), "needs the column 'reward_router"),
        ("queries, labels", ("answer",), "needs the column 'labels'"),
        ("completion, answer", ("gold",), "needs the column 'answer'"),
        ("completion, parser", ("answer",), r"needs a parser of verifiers.*reward_kwargs"),
        ("completions, answers", ("answer",), "needs the column 'answers'.*trl.*verifiers_group"),
        ("text, label", ("answer",), "no convention can be recognised. The data's columns are answer"),
        ("text, label", ("text", "label"), "no convention can be recognised. The data's columns are text, label"),
    ],
)
def test_what_data_lacks_is_found_before_any_call(signature: str, columns: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        named(with_signature(signature)).check(columns)


def test_the_settings_know_every_convention():
    assert set(get_args(ConventionName)) == set(CONVENTIONS)


def test_answers_that_are_a_column_make_it_trl():
    named(with_signature("completions, answers")).check(["answers"])


def test_trl_is_told_lists_and_what_trl_gives():
    seen: dict[str, Any] = {}

    def reward(prompts, completions, completion_ids, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [1.0, 2.0]

    state = SimpleNamespace(global_step=3, max_steps=9)
    extras = {"trainer_state": state, "log_metric": print, "log_extra": print, "step": 3, "run": "r"}
    [call] = named(reward).calls(Rows(BATCH, ("4", "red"), [[1], [2, 3]], ("stop", "length"), extras))
    reward(**call)
    assert seen["prompts"] == ["2+2=", "sky: "]
    assert seen["completion_ids"] == [[1], [2, 3]]
    assert seen["solution"] == ["s0", "s1"]
    assert seen["trainer_state"] is state
    assert seen.keys() >= {"log_metric", "log_extra", *COLUMNS}
    assert not seen.keys() & {"step", "run", "finish_reasons"}, "what TRL does not know is given by name only"


def test_what_is_offered_beside_the_rows_comes_by_name():
    reward = named(with_signature("completions, finish_reasons, step, run"))
    reward.check([])
    [call] = reward.calls(Rows(BATCH, ("4", "red"), None, ("stop", "length"), {"step": 3, "run": "r"}))
    assert (call["finish_reasons"], call["step"], call["run"]) == (["stop", "length"], 3, "r")
    with pytest.raises(ValueError, match="needs 'finish_reasons', which these rows do not have"):
        reward.calls(ROWS)
    column = named(with_signature("completions, step")).calls(rows_with(step=(1, 2)))
    assert column[0]["step"] == [1, 2], "a column of the data goes first"


def test_verl_finds_its_ground_truth_and_defaults():
    reward = named(with_signature("data_source, solution_str, ground_truth, extra_info, **kwargs"))
    rows = rows_with(reward_model=({"ground_truth": "4", "style": "rule"}, {"ground_truth": "b"}), other=(1, 2))
    reward.check(rows.batch.columns)
    assert reward.calls(rows) == [
        {"data_source": "", "solution_str": "4", "ground_truth": "4", "extra_info": {}},
        {"data_source": "", "solution_str": "red", "ground_truth": "b", "extra_info": {}},
    ]
    full = rows_with(data_source=("gsm8k", "x"), ground_truth=("a", "b"), extra_info=({"i": 1}, {"i": 2}))
    assert reward.calls(full)[1] == {
        "data_source": "x", "solution_str": "red", "ground_truth": "b", "extra_info": {"i": 2},
    }  # fmt: skip
    with pytest.raises(ValueError, match="row 8: the column reward_model holds no ground_truth"):
        reward.calls(rows_with(reward_model=({"ground_truth": "4"}, {})))
    batch = named(with_signature("data_sources, solution_strs, ground_truths, extra_infos=None"))
    [call] = batch.calls(rows)
    assert call["solution_strs"] == ["4", "red"]
    assert (call["ground_truths"], call["data_sources"]) == (["4", "b"], ["", ""])


def test_ground_truth_of_verl_serves_functions_of_two_arguments_as_well():
    reward = named(with_signature("predict_str, ground_truth"))
    rows = rows_with(reward_model=({"ground_truth": "4"}, {"ground_truth": "b"}))
    reward.check(rows.batch.columns)
    assert reward.calls(rows)[1] == {"predict_str": "red", "ground_truth": "b"}


def test_openrlhf_gets_lists_of_one():
    reward = named(with_signature("queries, prompts, labels, **kwargs"))
    assert reward.calls(ROWS)[1] == {"queries": ["sky: red"], "prompts": ["sky: "], "labels": ["l1"]}
    assert reward.calls(rows_with(label=("a", "b")))[0]["labels"] == ["a"]
    results = [
        {"rewards": torch.tensor([0.5]), "scores": torch.tensor([1.0]), "extra_logs": {"length": torch.tensor([3.0])}},
        {"rewards": 0.25},
    ]
    answers = reward.values(results, ROWS)
    assert answers.values == [0.5, 0.25]
    assert answers.notes == {"scores": [1.0, None], "length": [3.0, None]}


def test_openrlhf_and_prime_by_position_where_they_are_chosen():
    reward = named(with_signature("query, prompt, label"), convention="openrlhf")
    reward.check(COLUMNS)
    assert reward.calls(ROWS)[0] == {"query": ["2+2=4"], "prompt": ["2+2="], "label": ["l0"]}
    prime = named(with_signature("task, completion, reference, extra_info"), convention="prime")
    prime.check(COLUMNS)
    assert prime.calls(ROWS)[0] == {"task": "", "completion": "4", "reference": "four", "extra_info": {}}


def test_verifiers_are_told_by_name():
    [call, _] = named(with_signature("prompt, completion, answer, state, info, task, **kwargs")).calls(ROWS)
    assert (call["prompt"], call["completion"], call["answer"]) == ("2+2=", "4", "4")
    assert (call["info"], call["task"], call["reference"]) == ({}, "default", "r0")
    assert call["state"].items() >= {"prompt": "2+2=", "completion": "4", "answer": "4", "solution": "s0"}.items()
    group = named(with_signature("completions, answers, states"), convention="verifiers_group")
    group.check(COLUMNS)
    [call] = group.calls(ROWS)
    assert (call["completions"], call["answers"]) == (["4", "red"], ["4", "blue"])
    assert [state["completion"] for state in call["states"]] == ["4", "red"]


def test_two_arguments_go_by_name_never_by_position():
    rows = rows_with(ground_truth=("a", "b"))
    for signature in ("ground_truth, response", "response, ground_truth"):
        reward = named(with_signature(signature))
        reward.check(["ground_truth"])
        assert reward.calls(rows)[0] == {"ground_truth": "a", "response": "4"}
    chosen = named(with_signature("text, answer, reference"), convention="es")
    chosen.check(COLUMNS)
    assert chosen.calls(ROWS)[0] == {"text": "4", "answer": "4", "reference": "r0"}


def test_conversational_rewards_see_messages():
    [call] = named(with_signature("prompts, completions"), conversational=True).calls(ROWS)
    assert call["prompts"][0] == [{"role": "user", "content": "2+2="}]
    assert call["completions"][1] == [{"role": "assistant", "content": "red"}]
    [call, _] = named(with_signature("completion, answer"), conversational=True).calls(ROWS)
    assert call["completion"] == [{"role": "assistant", "content": "4"}]


def test_what_is_told_of_a_row_is_what_its_value_depends_on():
    extras = {"log_metric": print, "trainer_state": object()}
    rows = Rows(BATCH, ("4", "red"), [[1], [2, 3]], ("stop", "length"), extras)
    everything = named(with_signature("completions, log_metric, **kwargs"))
    assert everything.told(rows)[1] == {
        "completions": "red", "prompts": "sky: ", **{name: values[1] for name, values in COLUMNS.items()},
    }  # fmt: skip
    tokens = named(with_signature("completion_ids, finish_reasons"))
    assert tokens.told(rows)[1] == {"completion_ids": [2, 3], "finish_reasons": "length"}
    assert tokens.told(rows.select([1])) == tokens.told(rows)[1:]
    assert named(with_signature("queries, labels")).told(rows)[0] == {"queries": "2+2=4", "labels": "l0"}


BY_ROW = [
    (1, 1.0),
    (True, 1.0),
    (np.float32(0.5), 0.5),
    (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    (np.array(0.5), 0.5),
    (None, None),
    ({"score": 0.5, "acc": True, "pred": "x"}, 0.5),
    ({"reward": 0.5}, 0.5),
    ({"score": None}, None),
    (("correct", 0.5), 0.5),  # es-at-scale
    ((0.5, True), 0.5),  # NeMo-RL
    ((True, [{"error": None}]), 1.0),  # verl's prime_code
    ((False, True, "answer"), 0.0),  # verl's prime_math
]


@pytest.mark.parametrize(("result", "value"), BY_ROW)
def test_values_of_functions_of_one_row(result: Any, value: float | None):
    answers = named(with_signature("completion, answer")).values([result, 2], ROWS)
    assert answers.values == [value, 2.0]


def test_notes_beside_a_value_are_kept():
    answers = named(with_signature("solution_str")).values([{"score": 1, "acc": True, "pred": "x"}, 0.5], ROWS)
    assert answers.notes == {"acc": [1.0, None], "pred": ["x", None]}


@pytest.mark.parametrize(
    "result", ["high", [0.5], {"acc": 1.0}, {"score": "high"}, (0.5, 0.25), ("a", "b"), (), torch.ones(1), object()]
)
def test_what_is_no_value_raises_and_names_the_row(result: Any):
    with pytest.raises(ValueError, match=r"Reward reward returned .* row 8 \(prompt 'sky: ', completion 'red'\)"):
        named(with_signature("completion, answer")).values([1.0, result], ROWS)


@pytest.mark.parametrize(
    "result",
    [
        [1, 0.5],
        (1, 0.5),
        np.array([1, 0.5]),
        torch.tensor([1, 0.5], dtype=torch.bfloat16),
        [{"score": 1}, 0.5],
        {"rewards": torch.tensor([1, 0.5])},
        {"score": [1, 0.5]},
        [(1, True), ("label", 0.5)],
    ],
)
def test_values_of_functions_of_all_rows(result: Any):
    assert named(with_signature("completions")).values([result], ROWS).values == [1.0, 0.5]


def test_notes_on_a_batch():
    result = {"rewards": [1, 0.5], "scores": np.array([0.1, 0.2]), "extra_logs": {"n": [3, 4], "text": ["a", "b"]}}
    answers = named(with_signature("completions")).values([result], ROWS)
    assert answers.notes == {"scores": [0.1, 0.2], "n": [3.0, 4.0], "text": ["a", "b"]}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "returned 1 values for 2 rows"),
        (torch.ones(2, 1), r"returned \[1.0\] for row 7"),
        (1.0, r"returned 1\.0, and should return a list"),
        ({"other": [1, 2]}, r"the keys \['other'\].*rewards or reward or score"),
    ],
)
def test_a_batch_without_a_value_a_row_raises(result: Any, message: str):
    with pytest.raises(ValueError, match=message):
        named(with_signature("completions")).values([result], ROWS)


def test_failures_and_no_opinion_are_told_apart():
    down = OSError("the judge is down")
    assert named(with_signature("completions")).values([[None, down]], ROWS).values == [None, down]
    assert named(with_signature("completions")).values([down], ROWS).values == [down, down]
    assert named(with_signature("completion")).values([down, None], ROWS).values == [down, None]
    [nan, inf] = named(with_signature("completion")).values([float("nan"), 10**400], ROWS).values
    assert nan != nan
    assert inf == float("inf"), "what is not finite is for whoever asks to judge"
