"""Asking rewards: never twice, patiently where one is down, and the same on all ranks."""

import asyncio
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mezo_lightning.data.batch import Batch
from mezo_lightning.probes import Probe
from mezo_lightning.processes.ranks import RankError, Ranks
from mezo_lightning.rewarding import asking
from mezo_lightning.rewarding.asking import RewardDownError
from mezo_lightning.rewarding.rewards import Rewards, RewardValues
from mezo_lightning.rewarding.settings import Reward


def batch_of(*golds: str) -> Batch:
    size = len(golds)
    return Batch(
        index=tuple(range(10, 10 + size)), prompts=tuple(f"p{i}" for i in range(size)), targets=None, options=None,
        answers=None, columns={"gold": golds},
    )  # fmt: skip


BATCH = batch_of("x", "y", "z", "x")
SAID = ("a", "bb", "ccc", "dddd")


class Counted:
    """Scores the length of each completion, and counts what it is asked about."""

    per_sample = True
    remote = True
    identity = "counted"

    def __init__(self, fails: Callable[[str, int], bool] = lambda text, before: False):
        self.asked: Counter[str] = Counter()
        self.calls = 0
        self.fails = fails

    def __call__(self, prompts: list[str], completions: list[str], gold: list[str]) -> list[Any]:
        self.calls += 1
        answers = [ConnectionError("down") if self.fails(text, self.asked[text]) else len(text) for text in completions]
        self.asked.update(completions)
        return answers


def first_column(result: RewardValues) -> list[float]:
    return result.values[:, 0].tolist()


# -- never twice -------------------------------------------------------------------------------------------------------


def test_a_row_is_asked_about_once_and_different_rows_only() -> None:
    reward = Counted()
    rewards = Rewards(reward)
    same = Batch((1, 2, 3), ("p", "p", "q"), None, None, None, {"gold": ("x", "x", "x")})
    assert first_column(rewards(same, ("a", "a", "a"))) == [1, 1, 1]
    assert reward.asked == {"a": 2}, "two rows are the same, one has another prompt"
    assert first_column(rewards(same, ("a", "bb", "a"))) == [1, 2, 1]
    assert reward.asked == {"a": 2, "bb": 1}
    assert first_column(rewards(same, ("a", "bb", "a"))) == [1, 2, 1]
    assert reward.calls == 2
    other = Batch((1, 2, 3), ("p", "p", "q"), None, None, None, {"gold": ("x", "x", "other")})
    rewards(other, ("a", "a", "a"))
    assert reward.asked["a"] == 3, "another column is another question"


def test_a_reward_that_looks_at_the_whole_batch_is_asked_each_time_and_at_once() -> None:
    seen: list[Any] = []

    def best_of_batch(completions: list[str]) -> list[float]:
        seen.append(completions)
        return [float(len(text) == max(map(len, completions))) for text in completions]

    rewards = Rewards(best_of_batch)
    for _ in range(2):
        assert first_column(rewards(BATCH, ("a", "a", "bb", "a"))) == [0, 0, 1, 0]
    assert seen == [["a", "a", "bb", "a"]] * 2


def test_a_reward_that_may_change_with_the_step_is_asked_each_time() -> None:
    steps = []

    def later_is_better(completions: list[str], trainer_state: Any, step: int, run: str) -> list[float]:
        steps.append((trainer_state.global_step, trainer_state.max_steps, step, run))
        return [float(step)] * len(completions)

    rewards = Rewards(Reward(later_is_better, per_sample=True))
    for step in (3, 4):
        probe = Probe(step=step, max_steps=9, run="night")
        assert first_column(rewards(BATCH, SAID, probe=probe)) == [step] * 4
    assert steps == [(3, 9, 3, "night"), (4, 9, 4, "night")]


def test_no_opinion_is_an_answer_and_a_failure_is_none() -> None:
    asked: Counter[str] = Counter()

    def reward(completions: list[str]) -> list[Any]:
        asked.update(completions)
        return [{"a": None, "bb": math.nan, "ccc": OSError("down")}.get(text, 1.0) for text in completions]

    rewards = Rewards(Reward(reward, per_sample=True), on_failure="mask")
    for _ in range(2):
        result = rewards(BATCH, SAID)
        assert result.failed.tolist() == [False, True, True, False]
        assert math.isnan(first_column(result)[0])
    assert asked == {"a": 1, "bb": 2, "ccc": 2, "dddd": 1}


def test_what_one_row_is_told_decides_finish_reasons_too() -> None:
    seen = []

    def reward(completions: list[str], finish_reasons: list[str]) -> list[float]:
        seen.append(finish_reasons)
        return [float(reason == "stop") for reason in finish_reasons]

    rewards = Rewards(Reward(reward, per_sample=True))
    same = Batch((1, 2), ("p", "p"), None, None, None, {})
    assert first_column(rewards(same, ("a", "a"), finish_reasons=("stop", "length"))) == [1, 0]
    assert seen == [["stop", "length"]]


def test_a_second_run_makes_no_call(tmp_path: Path) -> None:
    first, second = Counted(), Counted()
    Rewards(first, cache=str(tmp_path / "answers.sqlite"))(BATCH, SAID)
    rewards = Rewards(second, cache=str(tmp_path / "answers.sqlite"))
    assert first_column(rewards(BATCH, SAID)) == [1, 2, 3, 4]
    assert (first.calls, second.calls) == (1, 0)
    assert rewards.take_tally().calls() == {"asked": 0.0, "failed": 0.0, "hit_rate": 1.0}


def test_answers_outlive_the_failure_that_ends_a_run(tmp_path: Path) -> None:
    cache = str(tmp_path / "answers.sqlite")
    failing = Counted(fails=lambda text, before: text == "bb")
    with pytest.raises(RuntimeError, match=r"Counted failed for row 11 .*: ConnectionError: down"):
        Rewards(failing, on_failure="raise", cache=cache)(BATCH, SAID)
    resumed = Counted()
    Rewards(resumed, cache=cache)(BATCH, SAID)
    assert resumed.asked == {"bb": 1}


# -- failures ----------------------------------------------------------------------------------------------------------


def test_remote_rewards_are_masked_unless_someone_says_otherwise() -> None:
    def failing() -> Counted:
        return Counted(fails=lambda text, before: text == "a")

    assert Rewards(failing())(BATCH, SAID).failed.tolist() == [True, False, False, False]
    for rewards in (Rewards(failing(), on_failure="raise"), Rewards(Reward(failing(), on_failure="raise"))):
        with pytest.raises(RuntimeError, match="Counted failed for row 10"):
            rewards(BATCH, SAID)
    masked = Rewards(Reward(failing(), on_failure="mask"), on_failure="raise")
    assert masked(BATCH, SAID).failed.tolist() == [True, False, False, False]


def test_failures_are_said_once_a_kind_and_then_counted(caplog: pytest.LogCaptureFixture) -> None:
    kinds = [ConnectionError("down"), ConnectionError("still down"), TimeoutError("late"), 1.0]
    rewards = Rewards(lambda completions: kinds, on_failure="mask")
    with caplog.at_level(logging.WARNING):
        for _ in range(50):
            rewards(BATCH, SAID)
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if "down" in text]) == 1
    assert len([text for text in said if "late" in text]) == 1
    assert "Reward lambda: 100 failures of the kind ConnectionError so far." in said
    assert len(said) == 2 + 2 + 1
    assert rewards.take_tally().calls()["failed"] == 150


def test_a_mistake_in_the_set_up_ends_the_run_and_a_later_one_is_a_failure() -> None:
    works = True

    def reward(completions: list[str]) -> list[float]:
        if not works:
            raise ValueError("401: no such key")
        return [1.0] * len(completions)

    rewards = Rewards(reward, on_failure="mask")
    works = False
    with pytest.raises(ValueError, match="Reward reward refused its first call: 401: no such key"):
        rewards(BATCH, SAID)
    works = True
    rewards(BATCH, SAID)
    works = False
    assert rewards(BATCH, SAID).failed.all()


def test_a_call_that_hangs_costs_its_own_row(tmp_path: Path) -> None:
    path = tmp_path / "hanging.py"
    path.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None, trainer_state=None):\n"
        "    while solution_str == 'bb':\n"
        "        pass\n"
        "    return float(len(solution_str))\n"
    )
    batch = Batch(BATCH.index, BATCH.prompts, None, None, None, {"ground_truth": ("x",) * 4})
    rewards = Rewards(Reward(str(path), timeout=1.0), on_failure="mask")
    result = rewards(batch, SAID)
    assert result.failed.tolist() == [False, True, False, False]
    assert first_column(result)[2:] == [3, 4]


def test_a_time_limit_is_refused_before_the_run_where_it_cannot_be_kept() -> None:
    with pytest.raises(ValueError, match=r"Reward lambda has timeout=1\.0, and is no function with an import path"):
        Rewards(Reward(lambda completions: [1.0] * len(completions), timeout=1.0))


def test_rewards_are_asked_at_the_same_time() -> None:
    together = threading.Barrier(3)

    async def one(completions: list[str]) -> list[float]:
        await asyncio.to_thread(together.wait, 10)
        return [1.0] * len(completions)

    async def other(completions: list[str]) -> list[float]:
        return await one(completions)

    def plain(completions: list[str]) -> list[float]:
        together.wait(10)
        return [2.0] * len(completions)

    assert Rewards([plain, one, other])(BATCH, SAID).values[0].tolist() == [2, 1, 1]


def test_per_sample_conventions_are_called_for_each_row_at_once() -> None:
    together = threading.Barrier(4)

    async def compute_score(solution_str: str, ground_truth: str) -> dict[str, float]:
        await asyncio.to_thread(together.wait, 10)
        return {"score": float(len(solution_str)), "cost": 0.5}

    batch = Batch(BATCH.index, BATCH.prompts, None, None, None, {"ground_truth": ("x",) * 4})
    rewards = Rewards(compute_score)
    assert first_column(rewards(batch, SAID)) == [1, 2, 3, 4]
    assert rewards.take_tally().statements() == {"rewards/compute_score/cost": 0.5}


def test_what_a_reward_says_beside_is_logged() -> None:
    def reward(completions: list[str], log_metric: Any, log_extra: Any) -> list[float]:
        log_metric("cost", 3)
        log_metric("cost", 5)
        log_metric("nothing", math.nan)
        log_extra("length", [1, 2, 3, 6])
        log_extra("verdict", ["good"] * 4)
        return [1.0] * len(completions)

    rewards = Rewards(reward)
    notes = rewards(BATCH, SAID).notes
    assert [{**each} for each in notes] == [
        {"reward/length": n, "reward/verdict": "good"} for n in (1.0, 2.0, 3.0, 6.0)
    ]
    tally = rewards.take_tally()
    assert tally.statements() == {"rewards/reward/cost": 4.0, "rewards/reward/length": 3.0}
    calls = tally.calls()
    assert (calls["asked"], calls["failed"], calls["hit_rate"]) == (4.0, 0.0, 0.0)
    assert 0 < calls["seconds_p50"] <= calls["seconds_p95"]
    assert rewards.take_tally().calls() == {}, "they were taken"


NOTES = """
def by_row(completion, gold, log_extra):
    log_extra("letters", [len(completion)])
    log_extra("why", [f"{completion} is not {gold}"])
    return {"score": 1.0, "pred": completion[:1], "nothing": None}

def at_once(completions, gold, log_extra):
    import torch

    log_extra("letters", torch.tensor([len(text) for text in completions]))
    log_extra("why", [f"{text} is not {right}" for text, right in zip(completions, gold)])
    log_extra(column="pred", values=tuple(text[:1] for text in completions))
    log_extra("nothing", [None] * len(completions))
    return [1.0] * len(completions)
"""


@pytest.mark.parametrize(("name", "timeout"), [("by_row", None), ("at_once", None), ("by_row", 60)])
def test_a_remembered_answer_has_the_notes_of_a_fresh_one(name: str, timeout: float | None, tmp_path: Path) -> None:
    (tmp_path / "noting.py").write_text(NOTES)
    settings = Reward(f"{tmp_path}/noting.py:{name}", per_sample=True, timeout=timeout, name="r")
    expected = [
        {"r/letters": float(len(text)), "r/why": f"{text} is not {gold}", "r/pred": text[:1]}
        for text, gold in zip(SAID, BATCH.columns["gold"], strict=True)
    ]
    rewards, later = (Rewards(settings, cache=str(tmp_path / "answers.sqlite")) for _ in range(2))
    for asked, hit_rate in ((rewards, 0.0), (rewards, 1.0), (later, 1.0)):
        assert [{**each} for each in asked(BATCH, SAID).notes] == expected
        assert asked.take_tally().calls()["hit_rate"] == hit_rate


def test_notes_that_fit_no_rows_are_refused() -> None:
    def reward(completions: list[str], log_extra: Any) -> list[float]:
        log_extra("why", "good")
        return [1.0] * len(completions)

    with pytest.raises(
        ValueError, match=r"log_extra\('why', ...\) takes a list with an entry for each of 4 completions"
    ):
        Rewards(reward)(BATCH, SAID)


# -- masks of another run ----------------------------------------------------------------------------------------------


def test_masked_rows_are_neither_asked_about_nor_counted() -> None:
    reward = Counted(fails=lambda text, before: text in ("a", "bb"))
    rewards = Rewards([reward, Reward(Counted(), name="other")], on_failure="raise")
    result = rewards(BATCH, SAID, masked={(0, 0), (0, 1), (1, 0)})
    assert reward.asked == {"ccc": 1, "dddd": 1}
    assert result.values.isnan().tolist() == [[True, True], [True, False], [False, False], [False, False]]
    assert not result.failed.any()


def test_a_masked_row_of_a_batch_may_fail() -> None:
    rewards = Rewards(lambda completions: [OSError("down"), 1.0, 2.0, 3.0], on_failure="raise")
    result = rewards(BATCH, SAID, masked={(0, 0), (1, 0)})
    assert result.values.isnan()[:, 0].tolist() == [True, True, False, False]
    assert not result.failed.any()


# -- a reward that is down ---------------------------------------------------------------------------------------------


@pytest.fixture
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_FIRST_PAUSE", 0.01)


@pytest.mark.usefixtures("_hurry")
def test_the_run_waits_until_something_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    reward = Counted(fails=lambda text, before: before < (3 if text == "bb" else 9))
    rewards = Rewards(reward)
    with caplog.at_level(logging.WARNING):
        result = rewards(BATCH, SAID)
    assert result.failed.tolist() == [True, False, True, True], "whatever still fails is left out"
    assert reward.asked == dict.fromkeys(SAID, 4)
    said = [record.getMessage() for record in caplog.records]
    assert "answers nothing (ConnectionError: down): the run is paused, and asks again in" in said[0]
    assert any("answers again" in text for text in said)
    rewards(BATCH, SAID)
    assert reward.asked["bb"] == 4, "who answered is not asked again"


@pytest.mark.usefixtures("_hurry")
def test_the_wait_ends_with_the_patience() -> None:
    rewards = Rewards(Counted(fails=lambda text, before: True), patience=0.05)
    with pytest.raises(RewardDownError, match=r"Counted has answered nothing .* ConnectionError: down.* be resumed"):
        rewards(BATCH, SAID)


@pytest.mark.usefixtures("_hurry")
def test_a_row_that_always_fails_does_not_stop_the_run() -> None:
    reward = Counted(fails=lambda text, before: text == "a")
    rewards = Rewards(reward, patience=0.0)
    for _ in range(9):
        assert rewards(batch_of("x"), ("a",)).failed.all()
        assert rewards(batch_of("x", "y"), ("a", "bb")).failed.tolist() == [True, False]
    assert reward.asked == {"a": 18, "bb": 1}


@pytest.mark.usefixtures("_hurry")
def test_an_outage_is_noticed_in_small_batches_too() -> None:
    rewards = Rewards(Counted(fails=lambda text, before: True), patience=0.0)
    for text in "abc":
        assert rewards(batch_of("x"), (text,)).failed.all()
    with pytest.raises(RewardDownError):
        rewards(batch_of("x"), ("d",))


def test_what_will_be_done_about_failures_is_said_before_the_run(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Rewards([Counted(), lambda completions: [1.0] * 4], patience=30).startup(BATCH, SAID)
    assert [record.getMessage() for record in caplog.records] == [
        "Reward Counted is remote: failures leave their sample out of the step, and where it answers nothing at all, "
        "the run waits for up to 30 s."
    ]


def test_nothing_is_waited_for_before_the_run() -> None:
    with pytest.raises(RuntimeError, match=r"Counted failed for row 10 .* and 3 more rows: ConnectionError: down"):
        Rewards(Counted(fails=lambda text, before: True)).startup(BATCH, SAID)


# -- several ranks -----------------------------------------------------------------------------------------------------


class Threads(Ranks):
    """Two ranks in one process."""

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier):
        self.rank, self.world_size = rank, 2
        self._shared, self._barrier = shared, barrier

    def gather(self, action: Callable[[], Any]) -> list[Any]:
        error = None
        try:
            self._shared[self.rank] = (action(), None)
        except Exception as raised:
            error = raised
            self._shared[self.rank] = (None, raised)
        self._barrier.wait(20)
        found = list(self._shared)
        self._barrier.wait(20)
        if error is not None:
            raise error
        for _, failure in found:
            if failure is not None:
                raise RankError(str(failure))
        return [value for value, _ in found]

    def collect(self, measure: Any, *, texts: bool) -> Any:
        raise NotImplementedError


def on_two_ranks(function: Callable[[Ranks], Any]) -> list[Any]:
    """What a function returns or raises on each of two ranks."""
    shared, barrier, results = [None, None], threading.Barrier(2), [None, None]

    def run(rank: int) -> None:
        try:
            results[rank] = function(Threads(rank, shared, barrier))
        except Exception as error:
            results[rank] = error  # pyright: ignore[reportArgumentType,reportCallIssue]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_each_row_is_asked_about_once_in_the_whole_job() -> None:
    by_row, at_once = [Counted(), Counted()], [Counter(), Counter()]

    def ask(ranks: Ranks) -> Any:
        def whole(completions: list[str]) -> list[float]:
            at_once[ranks.rank].update(completions)
            return [float(max(map(len, completions)))] * len(completions)

        rewards = Rewards([by_row[ranks.rank], whole])
        first = rewards(BATCH, SAID, probe=Probe(ranks=ranks))
        turned = Batch(BATCH.index[::-1], BATCH.prompts[::-1], None, None, None, {"gold": BATCH.columns["gold"][::-1]})
        second = rewards(turned, SAID[::-1], probe=Probe(ranks=ranks))
        return first.values.tolist(), second.values.tolist(), rewards.take_tally().calls()["asked"]

    one, other = on_two_ranks(ask)
    assert one == other
    assert one == ([[1, 4], [2, 4], [3, 4], [4, 4]], [[4, 4], [3, 4], [2, 4], [1, 4]], 12.0)
    assert by_row[0].asked == {"a": 1, "bb": 1}
    assert by_row[1].asked == {"ccc": 1, "dddd": 1}, "what the other rank was answered is known here too"
    assert at_once == [dict.fromkeys(SAID, 2), {}]


def test_limits_on_requests_hold_for_the_whole_job() -> None:
    class Service(Counted):
        async def __call__(self, prompts: list[str], completions: list[str], gold: list[str]) -> list[Any]:
            return super().__call__(prompts, completions, gold)

    services = [Service(), Service()]

    def ask(ranks: Ranks) -> Any:
        rewards = Rewards(services[ranks.rank])
        return rewards(BATCH, SAID, probe=Probe(ranks=ranks), masked={(1, 0)}).values[:, 0].nan_to_num(-1).tolist()

    assert on_two_ranks(ask) == [[1, -1, 3, 4]] * 2
    assert [service.asked for service in services] == [{"a": 1, "ccc": 1, "dddd": 1}, {}], "rank zero asks for all"


def test_masks_agree_and_errors_reach_all_ranks() -> None:
    def ask(ranks: Ranks, **arguments: Any) -> Any:
        rewards = Rewards(Counted(fails=lambda text, before: text == "dddd"), **arguments)
        return rewards(BATCH, SAID, probe=Probe(ranks=ranks)).failed.tolist()

    assert on_two_ranks(ask) == [[False, False, False, True]] * 2
    zero, one = on_two_ranks(lambda ranks: ask(ranks, on_failure="raise"))
    assert isinstance(zero, RankError)
    assert isinstance(one, RuntimeError)
    assert "Counted failed for row 13" in str(zero)
    assert "Counted failed for row 13" in str(one)
