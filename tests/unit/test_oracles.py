"""Oracles and what is made of their answers: who is asked what, in which order, and what a failure does."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mezo_lightning.data.batch import Batch
from mezo_lightning.encoding import Encoding
from mezo_lightning.estimators import CentralDifference, Comparison
from mezo_lightning.evaluators import Samples
from mezo_lightning.generation import Generate
from mezo_lightning.models.pretrained import Pretrained
from mezo_lightning.objectives import CrossEntropy, RewardObjective
from mezo_lightning.objectives.preference import PreferenceObjective, check_estimator, comparison
from mezo_lightning.probes import Probe
from mezo_lightning.rewarding.log import Tally
from mezo_lightning.rewarding.oracles import Oracle
from mezo_lightning.rewarding.settings import Reward

PROBE = Probe(step=7, max_steps=9, run="test")


def longer(prompts, first, second):
    return [float((len(a) > len(b)) - (len(a) < len(b))) for a, b in zip(first, second, strict=True)]


def texts(*completions: str) -> Samples:
    values = torch.zeros(len(completions), 1, dtype=torch.float64)
    return Samples(values, torch.zeros_like(values, dtype=torch.bool), completions)


def batch_of(count: int, **columns: Any) -> Batch:
    rows = range(count)
    named = {name: tuple(values) for name, values in columns.items()}
    return Batch(tuple(100 + row for row in rows), tuple(f"p{row}" for row in rows), None, None, None, named)


@pytest.fixture
def bound(make_model, tokenizer) -> Callable[..., Any]:
    def bind(oracle: Any, **options: Any) -> Any:
        objective = PreferenceObjective(oracle, Generate(max_new_tokens=4), **options)
        return objective.bind(make_model("opt"), tokenizer, Encoding())

    return bind


@dataclass
class Recorder:
    """Answers with what it is told to, and keeps what it was asked."""

    answer: Any = longer
    remote: bool = False
    per_sample: bool = False
    identity: str = "recorder"
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    told: list[dict] = field(default_factory=list)

    def __call__(self, prompts, first, second, step, run, trainer_state, log_metric):
        self.asked += zip(prompts, first, second, strict=True)
        self.told.append({"step": step, "run": run, "max_steps": trainer_state.max_steps})
        log_metric("pairs", len(first))
        return self.answer(prompts, first, second) if callable(self.answer) else self.answer


def test_the_longer_wins_whatever_the_order(bound):
    batch = batch_of(40)
    objective = bound(oracle := Recorder())
    short, long = texts(*["a"] * 40), texts(*["bb"] * 40)
    found = objective.compare(batch, [(short, long), (long, short)], seed=3, probe=PROBE)
    assert found.values.tolist() == [[-1.0] * 40, [1.0] * 40]
    shown = [first for _, first, _ in oracle.asked]
    assert 20 < shown.count("a") < 60, "which one comes first is drawn"
    again = Recorder()
    bound(again).compare(batch, [(short, long), (long, short)], seed=3, probe=PROBE)
    assert again.asked == oracle.asked, "and the same draw at the same step"
    other = Recorder()
    bound(other).compare(batch, [(short, long), (long, short)], seed=4, probe=PROBE)
    assert other.asked != oracle.asked
    assert oracle.told == [{"step": 7, "run": "test", "max_steps": 9}], "all pairs of a step in one call"


def test_an_oracle_that_likes_the_first_place_gives_no_direction(bound):
    """Always 'the first': over many rows the turned order cancels, to within its own standard error."""
    count = 400
    objective = bound(Recorder(lambda prompts, first, second: [1.0] * len(first)))
    pair = texts(*["a"] * count), texts(*["bb"] * count)
    votes = objective.compare(batch_of(count), [pair], seed=1, probe=PROBE).values
    assert abs(float(votes.mean())) < 4 / count**0.5


def test_identical_completions_are_ties_without_asking(bound):
    objective = bound(oracle := Recorder())
    found = objective.compare(batch_of(3), [(texts("a", "b", ""), texts("a", "bb", ""))], seed=1, probe=PROBE)
    assert found.values.tolist() == [[0.0, -1.0, 0.0]]
    assert [prompt for prompt, *_ in oracle.asked] == ["p1"]
    assert found.metrics["preference/asked"].tolist() == [[0.0, 1.0, 0.0]]
    silent = bound(Recorder(None))
    assert silent.compare(batch_of(1), [(texts("a"), texts("a"))], seed=1, probe=PROBE).values.tolist() == [[0.0]]


def test_no_opinion_leaves_out_a_pair_and_a_failure_the_sample(bound):
    def answer(prompts, first, second):
        return [None if p == "p0" else OSError("gone") if {a, b} == {"x", "y"} else 0.5 for p, a, b in
                zip(prompts, first, second, strict=True)]  # fmt: skip

    objective = bound(Recorder(answer, remote=True))
    one, two = (texts("a", "x", "a"), texts("b", "y", "b")), (texts("a", "a", "a"), texts("b", "b", "b"))
    found = objective.compare(batch_of(3), [one, two], seed=1, probe=PROBE)
    known = ~found.values.isnan()
    assert known.tolist() == [[False, False, True], [False, False, True]]
    assert found.metrics["preference/failed"].tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert found.values[known].abs().tolist() == [0.5, 0.5]
    tally = objective.take_tally()
    assert (tally.asked, tally.failed) == (6, 1)
    assert tally.statements() == {"rewards/Recorder/pairs": 6.0}
    assert objective.take_tally().asked == 0


def test_failures_raise_unless_the_oracle_is_remote(bound, caplog: pytest.LogCaptureFixture):
    mixed = [1.0, OSError("gone")]
    pair = texts("a", "a"), texts("b", "b")
    with pytest.raises(RuntimeError, match=r"Recorder failed for row 101 .*OSError: gone"):
        bound(Recorder(mixed)).compare(batch_of(2), [pair], seed=1, probe=PROBE)
    with pytest.raises(RuntimeError, match="OSError: gone"):
        bound(Recorder(mixed, remote=True), on_failure="raise").compare(batch_of(2), [pair], seed=1, probe=PROBE)
    with caplog.at_level(logging.WARNING):
        masked = bound(Recorder(mixed), on_failure="mask").compare(batch_of(2), [pair], seed=1, probe=PROBE)
    assert masked.values.isnan().tolist() == [[False, True]]
    assert "OSError: gone" in caplog.text


def test_an_oracle_that_never_worked_raises_even_where_failures_are_masked(bound):
    objective = bound(Recorder([OSError("no route"), OSError("no route")], remote=True))
    with pytest.raises(RuntimeError, match="no route"):
        objective.compare(batch_of(2), [(texts("a", "a"), texts("b", "b"))], seed=1, probe=PROBE)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], "returned 1 values for 2 rows"),
        ("first", "returned 'first'"),
        (["first", "second"], "returned 'first'"),
        ([True, False], "answers with True and False"),
        ([1.0, 7.0], r"answered 7\.0 for row 101"),
    ],
)
def test_answers_that_are_none_are_refused(bound, answer: Any, message: str):
    """Even where failures are masked: they would never get better."""
    objective = bound(Recorder(answer), on_failure="mask")
    with pytest.raises(ValueError, match=message):
        objective.compare(batch_of(2), [(texts("a", "a"), texts("b", "b"))], seed=1, probe=PROBE)


def test_answers_that_are_not_finite_are_failures(bound):
    objective = bound(Recorder([1.0, float("nan")]), on_failure="mask")
    found = objective.compare(batch_of(2), [(texts("a", "a"), texts("b", "b"))], seed=1, probe=PROBE)
    assert found.metrics["preference/failed"].tolist() == [[0.0, 1.0]]


def test_async_oracles_are_awaited(bound):
    async def later(prompts, first, second):
        await asyncio.sleep(0)
        return longer(prompts, first, second)

    found = bound(later).compare(batch_of(1), [(texts("aa"), texts("b"))], seed=1, probe=PROBE)
    assert found.values.tolist() == [[1.0]]


def test_a_pair_that_was_answered_is_not_asked_about_again(bound):
    asked = []

    @dataclass
    class Judge:
        per_sample = True
        identity = "judge"

        def __call__(self, prompts, first, second, **columns):
            asked.extend(prompts)
            return longer(prompts, first, second)

    objective = bound(Judge())
    pair = texts("a", "b"), texts("aa", "bb")
    both = [objective.compare(batch_of(2), [pair, pair], seed=1, probe=PROBE).values.tolist() for _ in range(2)]
    assert both == [[[-1.0, -1.0], [-1.0, -1.0]]] * 2
    assert len(asked) <= 4, "at most once in either order"


def test_columns_are_passed_and_missed(bound):
    def knows(prompts, first, second, wanted):
        return [1.0 if a == want else -1.0 for a, want in zip(first, wanted, strict=True)]

    objective = bound(knows)
    found = objective.compare(batch_of(2, wanted="ab"), [(texts("a", "a"), texts("b", "b"))], seed=1, probe=PROBE)
    assert found.values.tolist() == [[1.0, -1.0]]
    with pytest.raises(ValueError, match="needs the column 'wanted'"):
        objective.check(batch_of(2))
    assert "'wanted'" in objective.lacks(batch_of(2))
    assert objective.lacks(batch_of(2, wanted="ab")) is None
    with pytest.raises(ValueError, match="column 'first' has the name of an argument"):
        bound(longer).check(batch_of(2, first="ab"))


@pytest.mark.parametrize(
    ("oracle", "message"),
    [
        (lambda prompts, completions: [], "should take `first` and `second`"),
        ("rewards.squad.f1", "should take `first` and `second`"),
        ("no.such.oracle", "No module named 'no'"),
        (3, "neither a function nor an import path"),
        (Reward(longer, convention="trl"), "is for rewards"),
    ],
)
def test_what_is_no_oracle_is_refused_at_once(oracle: Any, message: str):
    with pytest.raises(ValueError, match=message):
        PreferenceObjective(oracle)


def test_settings_of_rewards_serve_oracles_too():
    oracle = Oracle(Reward(lambda prompts, first, second, margin: [margin], reward_kwargs={"margin": 0.25}, name="M"))
    assert oracle.name == "M"
    assert oracle.ask(batch_of(1), ["a"], ["b"], PROBE, Tally()) == [0.25]


def test_estimators_and_objectives_that_do_not_fit_are_refused():
    preference, base = PreferenceObjective(longer), Pretrained("embedded/opt-stories")
    check_estimator(Comparison(), preference, base)
    for objective in (CrossEntropy(), RewardObjective("rewards.squad.f1")):
        check_estimator(Comparison(), objective, base)
        check_estimator(CentralDifference(), objective, base)
    with pytest.raises(ValueError, match="use `estimator: Comparison`"):
        check_estimator(CentralDifference(), preference, base)


def test_only_comparisons_compare(bound, make_model, tokenizer):
    scores = RewardObjective("rewards.squad.f1").bind(make_model("opt"), tokenizer, Encoding())
    assert comparison(scores, batch_of(1), 0, PROBE) is None
    compare = comparison(bound(longer), batch_of(1), 0, PROBE)
    assert compare is not None
    assert compare([(texts("aa"), texts("b"))]).values.tolist() == [[1.0]]


def test_completions_have_no_value(bound, make_batch):
    objective = bound(longer)
    samples = objective.measure(make_batch(), seed=1)
    assert samples.completions is not None
    assert not samples.valid.any()
    assert objective.startup(make_batch()).completions == objective.predict(make_batch(), seed=0).completions


def test_the_win_rate_is_against_what_was_written_before_the_first_step(make_model, tokenizer, make_batch, caplog):
    model = make_model("opt")
    objective = PreferenceObjective(longer, Generate(max_new_tokens=8), win_rate=True)
    bound = objective.bind(model, tokenizer, Encoding())
    first = bound.measure(make_batch(), seed=1, probe=Probe(first=True))
    assert first.metrics["win_rate"].tolist() == [0.5] * 4
    assert bound.measure(make_batch(), seed=1, probe=Probe(step=1)).metrics["win_rate"].tolist() == [0.5] * 4
    assert not bound.take_tally().calls(), "nobody is asked about two completions that are the same"
    with torch.no_grad():
        model.get_input_embeddings().weight += 0.2 * torch.randn(320, 32, generator=torch.Generator().manual_seed(0))
    later = bound.measure(make_batch(), seed=1, probe=Probe(step=5))
    expected = [0.5 + 0.5 * vote for vote in longer(None, later.completions, first.completions)]
    assert later.completions != first.completions
    assert later.metrics["win_rate"].tolist() == expected
    assert "win_rate" not in bound.measure(make_batch(), seed=1, probe=Probe(step=5, round=0)).metrics
    resumed = objective.bind(model, tokenizer, Encoding())
    resumed.load_state_dict(bound.state_dict())
    assert resumed.measure(make_batch(), seed=1, probe=Probe(step=5)).metrics["win_rate"].tolist() == expected


def test_no_win_rate_is_measured_against_what_nobody_has_seen(make_model, tokenizer, make_batch, caplog):
    objective = PreferenceObjective(longer, Generate(max_new_tokens=8), win_rate=True)
    bound = objective.bind(make_model("opt"), tokenizer, Encoding())
    with caplog.at_level(logging.WARNING):
        for step in (0, 5):  # step 0 is also that of a tuned model whose trainer is another one
            assert bound.measure(make_batch(), seed=1, probe=Probe(step=step)).metrics["win_rate"].isnan().all()
    assert caplog.text.count("0 of the 4 rows of a batch have a win rate") == 1


def test_rows_that_were_not_written_to_before_have_no_win_rate(make_model, tokenizer, make_batch):
    model = make_model("opt")
    bound = PreferenceObjective(longer, Generate(max_new_tokens=8), win_rate=True).bind(model, tokenizer, Encoding())
    first = bound.measure(make_batch().select([1, 3]), seed=1, probe=Probe(first=True))
    with torch.no_grad():
        model.get_input_embeddings().weight += 0.2 * torch.randn(320, 32, generator=torch.Generator().manual_seed(0))
    later = bound.measure(make_batch(), seed=1, probe=Probe(step=5))
    votes = longer(None, [later.completions[place] for place in (1, 3)], first.completions)
    assert later.metrics["win_rate"][[1, 3]].tolist() == [0.5 + 0.5 * vote for vote in votes]
    assert later.metrics["win_rate"].isnan().tolist() == [True, False, True, False]
    assert later.metrics["win_rate/known"].tolist() == [0.0, 1.0, 0.0, 1.0]
