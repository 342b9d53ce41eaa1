"""Where a reward function comes from, what is known of it before it is called, and other projects' own functions."""

import asyncio
import functools
import importlib
import os
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mezo_lightning.data.batch import Batch
from mezo_lightning.rewarding.arguments import Rows
from mezo_lightning.rewarding.functions import NamedReward, imported, named_rewards
from mezo_lightning.rewarding.settings import Reward
from rewards.shaping import Clip
from rewards.text import Matches

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "rewards_functions.py"


def named(function: Any, **settings: Any) -> NamedReward:
    [reward] = named_rewards([Reward(function, **settings)])
    return reward


def asked(function: Any, texts: list[str], ids: Any = None, data: Any = None, **settings: Any) -> list[Any]:
    """What a reward says of some texts, beside which there are some columns of data."""
    columns = {name: tuple(values) for name, values in (data or {}).items()}
    prompts = ("",) * len(texts)
    rows = Rows(Batch(tuple(range(len(texts))), prompts, None, None, None, columns), texts, ids)
    reward = named(function, **settings)
    reward.check(rows.batch.columns)
    results = [reward.function(**call) for call in reward.calls(rows)]
    if reward.is_async:
        results = [asyncio.run(result) for result in results]
    return reward.values(results, rows).values


def length(completion: str, unit: int = 1) -> float:
    return len(completion) / unit


def lengths(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


async def lengths_later(completions: list[str]) -> list[float]:
    return lengths(completions)


class Later:
    async def __call__(self, completions: list[str]) -> list[float]:
        return lengths(completions)


class Judge:
    per_sample = True
    remote = True
    identity = "judge-7b at http://localhost"
    required_columns = ("gold",)

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return lengths(completions)


@dataclass(frozen=True)
class Scaled:
    factor: float

    def __call__(self, completions: list[str]) -> list[float]:
        return [self.factor * len(text) for text in completions]


def make_scaled(factor: float) -> Scaled:
    return Scaled(factor)


# -- import paths ------------------------------------------------------------------------------------------------------


def test_forms_of_import_paths():
    for path in ("rewards.squad.f1", "rewards.squad:f1"):
        assert imported(path).__name__ == "f1"
        assert named(path).importable == path
    assert imported(f"{EXAMPLES}:positive") is imported(f"{EXAMPLES}:positive"), "a file is loaded once"
    assert imported("os.path:join")("a", "b") == "a/b"


def test_a_file_is_loaded_by_itself(tmp_path: Path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('this must not run')\n")
    (package / "json.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Score:\n    value: float\n"
        "def reward_func(queries, prompts, labels):\n    return {'rewards': [Score(1.0).value]}\n"
        "def other(completion):\n    return 2.0\n"
    )
    assert asked(f"{package}/json.py", ["a"], data={"label": ["x"]}) == [1.0]
    assert asked(f"{package}/json.py:other", ["a"]) == [2.0]
    assert "json.py" not in (sys.modules["json"].__file__ or "").removeprefix(str(package))
    path = named(f"{package}/json.py").importable
    assert path == f"{package}/json.py:reward_func"
    assert named(imported(f"{package}/json.py:other")).importable == f"{package}/json.py:other"


def test_a_worker_finds_what_importable_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "plain_lengths.py").write_text("def length(completion):\n    return len(completion)\n")
    monkeypatch.syspath_prepend(tmp_path)
    function = importlib.import_module("plain_lengths").length
    paths = [named(function).importable, named(f"{tmp_path}/plain_lengths.py:length").importable]
    assert paths == ["plain_lengths:length", f"{tmp_path}/plain_lengths.py:length"]
    code = "import pickle; from rewards._worker import call\n"
    code += f"for path in {paths}: print(pickle.loads(call(path, {{'completion': 'abc'}}))[0])"
    environment = {**os.environ, "PYTHONPATH": f"{EXAMPLES.parents[1]}:{tmp_path}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["3", "3"], done.stderr


@pytest.mark.parametrize("function", [lambda completion: 1.0, Scaled(2.0), functools.partial(length, unit=2)])
def test_what_no_other_process_can_find_is_not_importable(function: Any):
    assert named(function).importable is None


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("rewards.squad.nonsense", r"no attribute 'nonsense'; write the import path of a function"),
        ("nonsense", "write the import path of a function"),
        ("no_such_module.f1", "No module named 'no_such_module'. Is it installed"),
        ("rewards.squad.string", "cannot be called"),
        ("/nowhere/rewards.py:f1", "there is no file '/nowhere/rewards.py'"),
        (f"{EXAMPLES}", "say which function of the file is meant"),
        (f"{EXAMPLES}:absent", "no attribute 'absent'"),
        ("./nowhere", "is no folder of a reward model"),
        ("a/b/c", "is no folder of a reward model"),
    ],
)
def test_paths_that_lead_nowhere(path: str, message: str):
    with pytest.raises(ValueError, match=message):
        named(path)


def test_a_file_that_fails_says_why_each_time(tmp_path: Path):
    (tmp_path / "broken.py").write_text("import no_such_thing\n")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"broken.py.*loaded by itself.*ModuleNotFoundError: .*no_such_thing"):
            named(f"{tmp_path}/broken.py:f")


# -- settings ----------------------------------------------------------------------------------------------------------


def test_names_are_those_of_functions_and_numbered():
    given = [lengths, "rewards.squad.f1", lengths, Matches("a"), Reward(lengths, name="words"), Clip(lengths)]
    assert [each.name for each in named_rewards(given)] == [
        "lengths", "f1", "lengths_2", "Matches", "words", "lengths_3",
    ]  # fmt: skip


def test_fixed_arguments_classes_and_functions_that_make_rewards():
    assert asked(length, ["abcd"], reward_kwargs={"unit": 2}) == [2.0]
    assert asked(Scaled, ["ab"], reward_kwargs={"factor": 3.0}) == [6.0]
    assert asked(make_scaled, ["ab"], reward_kwargs={"factor": 3.0}) == [6.0]
    assert asked("rewards.text.Matches", ["1", "a"], reward_kwargs={"pattern": r"\d"}) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("function", "kwargs", "message"),
    [
        (length, {"units": 2}, r"reward_kwargs names \['units'\], and reward length takes completion, unit"),
        (Scaled, {}, "Reward Scaled is a class: give an instance"),
        (Scaled, {"scale": 1}, "cannot be made with reward_kwargs"),
        (lambda a: 3, {"a": 1}, "what it made .* is no reward either.*: 3"),
        (lambda a, /: [1.0], {}, "positional-only"),
        (dict, {"a": 1}, "cannot be called"),
    ],
)
def test_fixed_arguments_that_do_not_fit(function: Any, kwargs: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        named(function, reward_kwargs=kwargs)


def test_a_column_map_renames_arguments():
    def exact(response: str, gold: str) -> float:
        return float(response == gold)

    rows = Rows(Batch((0, 1), ("", ""), None, None, None, {"answer": ("4", "x")}), ("4", "5"))
    reward = named(exact, columns={"gold": "answer"})
    reward.check(["answer"])
    assert reward.calls(rows)[0] == {"response": "4", "gold": "4"}
    with pytest.raises(ValueError, match="needs the column 'answers'; the data has: answer"):
        named(lengths, columns={"gold": "answers"}).check(["answer"])
    with pytest.raises(ValueError, match=r"columns names \['god'\], and reward exact takes response, gold"):
        named(exact, columns={"god": "answer"})
    [call] = named(lengths, columns={"gold": "answer"}).calls(rows)
    assert call["gold"] == ["4", "x"], "a **kwargs takes any name"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout": 0}, "timeout=0 must be a positive number"),
        ({"on_failure": "skip"}, "on_failure='skip'"),
        ({"convention": "trll"}, "convention='trll' is not known; use one of trl, verl"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        named(lengths, **settings)


def test_what_is_neither_callable_nor_a_path():
    with pytest.raises(ValueError, match="reward holds 3, which is neither a function nor an import path"):
        Reward(3)  # pyright: ignore[reportArgumentType]


# -- what a reward says about itself -----------------------------------------------------------------------------------


def test_async_functions_and_objects_are_known_as_such():
    assert named(lengths_later).is_async
    assert named(Later()).is_async
    assert named(functools.partial(lengths_later)).is_async
    assert named(Clip(lengths_later)).is_async
    assert not named(lengths).is_async
    assert asked(lengths_later, ["ab"]) == asked(Later(), ["ab"]) == [2.0]
    with pytest.raises(ValueError, match="lambda is async, and nothing about it says so"):
        asked(lambda completions: lengths_later(completions), ["ab"])


def test_attributes_and_settings():
    judge = named(Judge())
    assert (judge.per_sample, judge.remote) == (True, True)
    with pytest.raises(ValueError, match="Reward Judge needs the column 'gold'; the data has: answer"):
        judge.check(["answer"])
    assert not named(Judge(), per_sample=False).per_sample
    assert (named(lengths).per_sample, named(lengths).remote) == (False, False)
    assert named(lengths, per_sample=True).per_sample
    assert named(length, timeout=2.0, on_failure="mask").timeout == 2.0


def test_what_knows_the_step_is_not_remembered():
    def annealed(completion: str, trainer_state: Any) -> float:
        return trainer_state.global_step

    assert not named(annealed).per_sample
    assert not named(annealed, per_sample=True).per_sample


def test_identity_holds_what_decides_values_and_nothing_else():
    def times(factor: float):
        def reward(completion: str) -> float:
            return factor * len(completion)

        return reward

    same = [named(times(2.0)).identity for _ in range(2)]
    assert same[0] == same[1]
    others = {
        named(times(3.0)).identity,
        named(length).identity,
        named(length, reward_kwargs={"unit": 2}).identity,
        named(length, version="2").identity,
        named(Scaled(1.0)).identity,
        named(Scaled(2.0)).identity,
        named(Matches("a")).identity,
        named(Matches("b")).identity,
        named(Clip(lengths, low=0)).identity,
        named(Clip(lengths, low=1)).identity,
        named(functools.partial(length, unit=3)).identity,
        named(Judge()).identity,
    }
    assert len(others) == 12
    assert same[0] not in others
    assert named(Scaled(1.0)).identity == named(Scaled(1.0)).identity
    assert named("rewards.squad.f1").identity == named(imported("rewards.squad:f1")).identity


def test_identity_follows_the_source_and_a_version_takes_its_place(tmp_path: Path):
    def written(text: str, name: str, **settings: Any) -> str:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "r.py").write_text(text)
        return named(f"{folder}/r.py:f", **settings).identity

    text = "def helper(x):\n    return len(x)\ndef f(completion):\n    return helper(completion)\n"
    changed = text.replace("len(x)", "2 * len(x)")
    assert written(text, "a") == written(text, "b"), "wherever the file is"
    assert written(text, "c") != written(changed, "d"), "a helper counts too"
    assert written(text, "e", version="1") == written(changed, "f", version="1")
    assert written(text, "g", version="1") != written(text, "h", version="2")
    assert named(lengths, version="1").identity != named(lengths, version="2").identity
    assert named(lengths, version="1").identity.startswith("test_reward_functions.lengths@1")


def test_state_that_cannot_be_written_down_is_never_shared():
    def of(model: Any) -> Any:
        def reward(completion: str) -> float:
            return model

        return reward

    reward = of(torch.ones(1))
    assert named(reward).identity == named(reward).identity, "the same for as long as it lives"
    assert named(of(torch.ones(1))).identity != named(of(torch.ones(1))).identity
    assert named(of(torch.ones(1)), version="1").identity == named(of(torch.ones(1)), version="1").identity


# -- other projects' functions -----------------------------------------------------------------------------------------


def trl_rewards() -> Any:
    return pytest.importorskip("trl.rewards", reason="TRL is not installed")


def test_trl_format_and_lengths():
    trl_rewards()
    texts = ["<think>\nhm\n</think>\n4", "4"]
    assert asked("trl.rewards.think_format_reward", texts, conversational=True) == [1.0, 0.0]
    soft = {"max_completion_len": 10, "soft_punish_cache": 4}
    ids = [[1] * 5, [1] * 8, [1] * 12]
    assert asked("trl.rewards.get_soft_overlong_punishment", ["a"] * 3, ids, reward_kwargs=soft) == [0.0, -0.5, -1.0]
    repeated = [[1, 2, 3, 4], [5, 5, 5, 5, 5]]
    said = asked("trl.rewards:get_repetition_penalty_reward", ["a"] * 2, repeated, reward_kwargs={"ngram_size": 2})
    assert said == [0.0, -0.75]


def test_trl_accuracy():
    trl_rewards()
    pytest.importorskip("math_verify", reason="math-verify is not installed: TRL's accuracy needs it")
    texts, gold = [r"It is \boxed{\frac{1}{3}}", r"\boxed{2}", "no idea"], {"solution": ["$1/3$", "$3$", "no number"]}
    assert asked("trl.rewards.accuracy_reward", texts, data=gold, conversational=True) == [1.0, 0.0, None]
    cosine = {"max_len": 100, "min_value_wrong": -1.0, "max_value_wrong": -0.5, "min_value_correct": 0.5,
              "max_value_correct": 1.0}  # fmt: skip
    said = asked(
        *(
            "trl.rewards.get_cosine_scaled_reward",
            texts[:2],
            [[1] * 100, [1] * 100],
            {"solution": gold["solution"][:2]},
        ),
        reward_kwargs=cosine,
        conversational=True,
    )
    assert said == [pytest.approx(0.5), pytest.approx(-0.5)]
    thinking = ["<think>so</think> " + text for text in texts[:2]]
    gold = {"solution": gold["solution"][:2]}
    assert asked("trl.rewards.reasoning_accuracy_reward", thinking, data=gold, conversational=True) == [1.0, 0.0]


def test_vader():
    pytest.importorskip("vaderSentiment", reason="vaderSentiment is not installed")
    good, bad = asked(f"{EXAMPLES}:positive", ["A great, wonderful film.", "A terrible film."])
    assert good > 0.5
    assert bad < -0.3


def test_textstat():
    pytest.importorskip("textstat", reason="textstat is not installed")
    texts = ["It is so.", "Institutional considerations notwithstanding, implementation necessitates deliberation."]
    easy, hard = asked("textstat.coleman_liau_index", texts, columns={"text": "completion"})
    assert easy < hard
    near, far = asked(f"{EXAMPLES}:readable", texts)
    assert near > far


def test_profanity_check():
    pytest.importorskip("profanity_check", reason="alt-profanity-check is not installed")
    texts = ["You are a kind person.", "You are a fucking idiot."]
    kind, rude = asked("profanity_check.predict_prob", texts, columns={"texts": "completions"})
    assert kind < 0.2 < 0.8 < rude
    assert asked(f"{EXAMPLES}:polite", texts) == [pytest.approx(1 - kind), pytest.approx(1 - rude)]


def test_rewards_travel_between_processes():
    for reward in (Clip("rewards.squad.f1", low=0.0), Matches("a")):
        assert pickle.loads(pickle.dumps(reward)) == reward
