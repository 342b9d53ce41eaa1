"""People's votes: counted once each, in the order that was stored, whoever is killed when."""

import random
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from judging import TERMS, ask, choose, collect, standing

from rewards.person import looking, store
from rewards.person.database import transaction
from rewards.person.store import Refused, Store, Terms

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def votes(tmp_path: Path) -> Iterator[Store]:
    path = tmp_path / "votes.sqlite"
    # A connection that stays: without one every transaction ends by copying the log into the file, which takes longer.
    with closing(sqlite3.connect(path)) as db:
        Store(path).check()
        db.execute("SELECT * FROM vote").fetchall()
        yield Store(path)


class Clock:
    """Time that passes when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000_000.0
        monkeypatch.setattr(store.time, "time", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_an_answer_says_which_text_is_better_in_the_order_of_the_question(votes: Store):
    asked = ask(votes, ("good", "bad"), ("bad", "good"), ("good", "so-so"), ("one", "two"))
    for choice in (None, None, "tie", "skip"):
        choose(votes, "ann", "good", choice)
    assert collect(votes, asked) == [1.0, -1.0, 0.0, None]


def test_several_judges_are_averaged_and_skips_left_out(votes: Store):
    terms = Terms("?", overlap=3)
    asked = ask(votes, ("a", "b"), terms=terms)
    choose(votes, "ann", "a")
    choose(votes, "ben", "b", "skip")
    assert collect(votes, asked, terms=terms, give_up=False) is None
    choose(votes, "cy", None, "tie")
    assert collect(votes, asked, terms=terms, give_up=False) == [0.5]


def test_a_vote_sent_again_counts_once_and_a_second_one_is_refused(votes: Store):
    ask(votes, ("a", "b"))
    showing = votes.look("ann").showing
    assert showing is not None
    for _ in range(3):
        votes.vote("vote-one", showing.id, "ann", "left")
    with pytest.raises(Refused, match="already"):
        votes.vote("vote-two", showing.id, "ann", "right")
    with pytest.raises(Refused, match="not shown to you"):
        votes.vote("vote-three", showing.id, "ben", "right")
    with pytest.raises(Refused, match="not shown to you"):
        votes.vote("vote-four", 10**9, "ann", "right")
    assert [(vote["id"], vote["choice"]) for vote in standing(votes)] == [("vote-one", "left")]


def test_the_order_is_drawn_once_and_stays(votes: Store):
    terms = Terms("?", overlap=2)
    ask(votes, *((f"{row}", f"{row} more") for row in range(25)), terms=terms)
    lefts = Counter()
    for judge in ("ann", "ben"):
        for _ in range(25):
            seen = [Store(votes.path).look(judge).showing for _ in range(2)]
            assert seen[0] is not None
            assert seen[0] == seen[1]
            lefts[judge, seen[0].left.endswith("more")] += 1
            choose(votes, judge, seen[0].left)
    assert len(lefts) == 4  # either text came first, with either judge: fails once in 10^7 runs


def test_two_judges_never_get_the_same_pair_beyond_the_overlap(votes: Store, clock: Clock):
    ask(votes, ("a", "b"), ("c", "d"))
    seen = [votes.look(judge).showing for judge in ("ann", "ben", "cy")]
    assert seen[0] is not None
    assert seen[1] is not None
    assert seen[0].prompt != seen[1].prompt
    assert seen[2] is None
    clock.now += looking.LEASE_SECONDS - 1
    assert votes.look("ann").showing == seen[0]  # a sign of life
    clock.now += 2
    third = votes.look("cy").showing  # ben has left
    assert third is not None
    assert third.prompt == seen[1].prompt
    assert votes.look("ben").showing is None  # it is cy's now
    votes.vote("vote-late", seen[1].id, "ben", "tie")  # but what he had chosen counts
    assert [vote["id"] for vote in standing(votes)] == ["vote-late"]


def test_undo_shows_the_pair_again_in_the_same_order(votes: Store):
    asked = ask(votes, ("a", "b"), ("c", "d"))
    first = votes.look("ann").showing
    name = choose(votes, "ann", "a")
    assert name is not None
    assert votes.look("ann").showing != first
    assert votes.look("ann").undo == name
    with pytest.raises(Refused, match="no such"):
        votes.undo(name, "ben")
    for _ in range(2):  # sent twice
        votes.undo(name, "ann")
    assert votes.look("ann").showing == first
    assert collect(votes, asked, give_up=False) is None
    votes.vote(name, first.id if first else 0, "ann", "left")  # an old request that arrives late
    assert standing(votes) == []
    choose(votes, "ann", "b")
    choose(votes, "ann", "c")
    assert collect(votes, asked) == [-1.0, 1.0]


def test_what_the_run_has_used_cannot_be_undone(votes: Store):
    asked = ask(votes, ("a", "b"))
    name = choose(votes, "ann", "a")
    assert name is not None
    assert collect(votes, asked) == [1.0]
    assert votes.look("ann").undo is None
    with pytest.raises(Refused, match="gone on"):
        votes.undo(name, "ann")


def test_the_last_choice_can_be_undone_for_a_while(votes: Store, clock: Clock):
    terms = Terms("?", grace_seconds=3)
    asked = ask(votes, ("a", "b"), terms=terms)
    choose(votes, "ann", "a")
    clock.now += 2.9
    assert collect(votes, asked, terms=terms, give_up=False) is None
    clock.now += 0.2
    assert collect(votes, asked, terms=terms, give_up=False) == [1.0]


def test_a_resumed_run_finds_its_votes_and_other_texts_are_asked_anew(votes: Store):
    ask(votes, ("a", "b"), ("c", "d"), step=7)
    choose(votes, "ann", "a")
    again = ask(votes, ("b", "a"), ("c", "e"), step=7)  # the first with its probes the other way round
    assert votes.collect("run", 7, *again, TERMS, give_up=False).missing == 1
    shown = {votes.look(judge).showing for judge in ("ann", "ben", "cy")}
    assert {frozenset((s.left, s.right)) for s in shown if s} == {frozenset("ce"), frozenset("cd")}
    for judge in ("ann", "ben"):
        choose(votes, judge, "c")
    assert collect(votes, again, step=7) == [-1.0, 1.0]


def test_an_answer_that_was_handed_out_never_changes(votes: Store):
    asked = ask(votes, ("a", "b"), ("c", "d"))
    first, second = votes.look("ann").showing, votes.look("ben").showing
    assert first is not None
    assert second is not None
    votes.vote("vote-one", first.id, "ann", "left" if first.left == "a" else "right")
    assert collect(votes, asked) == [1.0, None]
    late = Store(votes.path)
    late.vote("vote-two", second.id, "ben", "left" if second.left == "c" else "right")
    with transaction(votes.path) as db:  # a judge whose lease had run out
        db.execute("INSERT INTO showing VALUES (99, (SELECT min(id) FROM pair), 'cy', 0, 1, 0, 0)")
    late.vote("vote-three", 99, "cy", "right")
    assert collect(votes, ask(votes, ("a", "b"), ("c", "d"))) == [1.0, 1.0]  # what had no vote has one now


def test_a_new_step_takes_back_what_the_last_one_asked(votes: Store):
    ask(votes, ("a", "b"), step=1)
    ask(votes, ("c", "d"), step=2)
    shown = [votes.look(judge).showing for judge in ("ann", "ben")]
    assert shown[0] is not None
    assert (shown[0].step, shown[1]) == (2, None)
    ask(votes, ("a", "b"), step=1)  # resumed from an earlier checkpoint
    shown = votes.look("ann").showing
    assert shown is not None
    assert shown.step == 1


def test_the_same_pair_is_asked_once_whichever_step_or_row_wants_it(votes: Store):
    asked = ask(votes, ("a", "b"), step=1)
    choose(votes, "ann", "a")
    assert collect(votes, asked, step=1) == [1.0]
    later = ask(votes, ("b", "a"), step=2)
    assert votes.look("ann").showing is None
    assert collect(votes, later, step=2, give_up=False) == [-1.0]
    elsewhere = ask(votes, ("a", "b"), step=3, terms=Terms("Another question"))
    assert collect(votes, elsewhere, step=3, terms=Terms("Another question"), give_up=False) is None


def test_a_second_look_is_the_other_way_round_later_and_does_not_count(votes: Store):
    terms = Terms("?", repeat_share=1.0)
    pairs = [(f"a{row}", f"b{row}") for row in range(looking.REPEAT_AFTER + 1)]
    asked = ask(votes, *pairs, terms=terms)
    first = votes.look("ann").showing
    assert first is not None
    for number in range(len(pairs)):
        assert votes.look("ann").progress.mine == number
        choose(votes, "ann", None, "left")
    answers = collect(votes, asked, terms=terms)
    second = votes.look("ann").showing
    assert second is not None
    assert (second.prompt, second.left, second.right) == (first.prompt, first.right, first.left)
    assert second.id != first.id
    ask(votes, ("new", "pair"), step=1, terms=terms)
    assert votes.look("ann").showing == second  # not taken from under the judge's eyes
    choose(votes, "ann", None, "left")  # the side again, so the other text
    progress = votes.look("ann").progress
    assert (progress.consistency, progress.consistency_of) == (0.0, 1)
    assert collect(votes, asked, terms=terms) == answers
    assert answers is not None
    elsewhere = ask(votes, pairs[0], step=2, terms=terms)
    assert collect(votes, elsewhere, step=2, terms=terms) == answers[:1]


def test_no_pair_is_shown_twice_where_the_share_is_zero(votes: Store):
    ask(votes, *((f"a{row}", f"b{row}") for row in range(12)))
    while choose(votes, "ann", None, "left"):
        pass
    assert len(standing(votes)) == 12


def test_agreement_counts_pairs_of_judges_who_saw_the_same(votes: Store):
    terms = Terms("?", overlap=2)
    ask(votes, ("a", "b"), ("c", "d"), ("e", "f"), terms=terms)
    for judge, best in (("ann", "ace"), ("ben", "acf")):
        for pair in ("ab", "cd", "ef"):
            showing = votes.look(judge).showing
            assert showing is not None
            assert {showing.left, showing.right} == set(pair)
            choose(votes, judge, next(text for text in pair if text in best))
    progress = votes.look("ann").progress
    assert (progress.agreement, progress.agreement_of) == (pytest.approx(2 / 3), 3)
    assert (progress.mine, progress.all, progress.judges) == (3, 6, 2)


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_requests_keeps_the_promises(votes: Store, clock: Clock, seed: int):
    """Judges look, vote, repeat requests, undo and leave, while a run asks, collects, restarts and goes on."""
    dice = random.Random(seed)
    terms = Terms("?", overlap=2, repeat_share=0.5)
    orders: dict[int, tuple[str, str]] = {}
    handed_out: dict[tuple[int, int, str], float | None] = {}
    step, sent = 0, []
    asked = ask(votes, ("a0", "b0"), ("a1", "b1"), ("a2", "b2"), terms=terms)
    for _ in range(80):
        clock.now += dice.choice((0.1, 5, 40))
        judge = dice.choice(("ann", "ben", "cy"))
        view = votes.look(judge)
        action = dice.choice(("vote", "vote", "vote", "again", "undo", "collect", "give up"))
        if view.showing:
            order = (view.showing.left, view.showing.right)
            assert orders.setdefault(view.showing.id, order) == order
        if action == "vote" and view.showing:
            sent.append((f"vote-{len(sent)}", view.showing.id, judge, dice.choice(store.CHOICES)))
            votes.vote(*sent[-1])
        elif action == "again" and sent:
            votes.vote(*dice.choice(sent))
        elif action == "undo" and view.undo:
            votes.undo(view.undo, judge)
        elif action in ("collect", "give up"):
            answers = collect(votes, asked, step=step, terms=terms, give_up=action == "give up")
            for question, answer in zip(asked[0], answers or [], strict=answers is not None):
                key = (step, question.row, question.first)
                assert handed_out.setdefault(key, answer) in (answer, None)
            if answers is not None:
                step = max(0, step + dice.choice((-1, 0, 1, 1)))
            texts = [(f"a{dice.choice((step, row))}", f"b{row}") for row in range(3)]
            asked = ask(votes, *texts, step=step, terms=terms)
        twice = Counter((vote["showing"],) for vote in standing(votes))
        assert max(twice.values(), default=1) == 1
    assert {vote["id"] for vote in standing(votes)} <= {vote[0] for vote in sent}


WRITER = """
import os, random, sys
from rewards.person.store import Question, Refused, Store, Terms
path, who, first = sys.argv[1], sys.argv[2], int(sys.argv[3])
print("here", flush=True)
votes, terms = Store(path), Terms("?", overlap=2, repeat_share=0.3)
for number in range(first, first + 10_000):
    if who == "run":
        step = number // 20
        questions = [Question(row, f"{step}-{row}", f"a{step}-{row}", f"b{step}-{row}") for row in range(8)]
        pairs = votes.ask("run", step, questions, terms)
        votes.collect("run", step, questions, pairs, terms, give_up=False)
        continue
    showing = votes.look(who).showing
    if showing is None:
        continue
    name = f"{who}-{os.getpid()}-{number}"
    print("send", name, showing.id, showing.left, showing.right, flush=True)
    votes.vote(name, showing.id, who, random.choice(("left", "right", "tie", "skip")))
    print("stored", name, flush=True)
"""


@pytest.mark.slow
def test_killed_writers_lose_and_double_nothing(tmp_path: Path, votes: Store):
    """A run and two judges, each killed with SIGKILL at random moments, again and again."""
    dice = random.Random(0)
    logs = []
    for number in range(5):
        writers = []
        for who in ("run", "ann", "ben"):
            log = tmp_path / f"{who}-{number}.txt"
            logs.append(log)
            with log.open("wb") as output:
                command = [sys.executable, "-c", WRITER, str(votes.path), who, str(number * 20)]
                writers.append(subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT))
        while not all(log.stat().st_size for log in logs):
            time.sleep(0.01)
        time.sleep(0.3 + 0.2 * dice.random())
        for writer in dice.sample(writers, 3):
            writer.kill()
            writer.wait()
            time.sleep(0.03 * dice.random())
    lines = [line.split() for log in logs for line in log.read_text().split("\n")[:-1]]
    assert {line[0] for line in lines} == {"here", "send", "stored"}, lines
    sent, stored = (Counter(line[1] for line in lines if line[0] == word) for word in ("send", "stored"))
    in_file = Counter(vote["id"] for vote in standing(votes))
    assert len(stored) > 20
    assert set(stored) <= set(in_file) <= set(sent)
    assert max(Counter(vote["showing"] for vote in standing(votes)).values()) == 1
    orders: dict[str, set] = {}
    for line in lines:
        if line[0] == "send":
            orders.setdefault(line[2], set()).add(tuple(line[3:]))
    assert all(len(order) == 1 for order in orders.values())
    with transaction(votes.path) as db:
        assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def test_processes_may_make_the_file_at_the_same_time(votes: Store):
    script = "import sys; from rewards.person.store import Store; print(Store(sys.argv[1]).look('ann').showing)"
    command = [sys.executable, "-c", script, str(votes.path)]
    makers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(6)]
    assert [maker.communicate()[0] for maker in makers] == ["None\n"] * 6


def test_another_file_is_refused_and_left_alone(tmp_path: Path):
    text, database, later = tmp_path / "notes.txt", tmp_path / "other.sqlite", tmp_path / "later.sqlite"
    text.write_text("not a database, but long enough to be looked at" * 40)
    with closing(sqlite3.connect(database)) as db:
        db.execute("CREATE TABLE theirs (x)")
    with transaction(later) as db:
        db.execute("PRAGMA user_version = 99")
    for path, message in ((text, "not a store"), (database, "another program"), (later, "another release")):
        with pytest.raises(ValueError, match=f"{path.name}.*{message}"):
            Store(path).check()
    assert text.read_text().startswith("not a database")
    with pytest.raises(ValueError, match="cannot be opened"):
        Store(text / "votes.sqlite").check()


def test_texts_of_any_kind_are_stored(votes: Store):
    nasty = ["\ud800", "\x00", "\ufeff\u202e", "'; DROP TABLE vote; --", "", "\r\n"]
    asked = ask(votes, *((text, text + "x") for text in nasty))
    for text in nasty:
        showing = votes.look("ann").showing
        assert showing is not None
        expected = text if text != "\ud800" else "\ufffd"
        assert {showing.left, showing.right} == {expected, expected + "x"}
        choose(votes, "ann", expected)
    assert collect(votes, asked) == [1.0] * len(nasty)
