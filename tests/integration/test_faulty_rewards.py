"""A reward server that fails in every way it can: the run ends, and no failure is part of what it learned."""

import contextlib
import json
import random
import select
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_same, data_of, model_of, module_of, reward_of, steps_of, trainer_of, weights
from reward_examples import letters

from mezo_lightning import Generate, RewardObjective
from mezo_lightning.callbacks import RunRecorder
from mezo_lightning.rewarding import asking
from mezo_lightning.rewarding.settings import Reward
from rewards.http import HTTPReward, Limits

STEPS = 200
FAULTS = {"error": 0.2, "hang": 0.1, "too many": 0.05, "malformed": 0.05}


class FaultyServer(ThreadingHTTPServer):
    """Scores letters, if it does; and keeps what happened, in order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.draw = random.Random(0)
        self.lock = threading.Lock()
        self.events: list[tuple[str, str, int]] = []
        """("asked" | "answered" | "closed", the row, the connection)"""
        self.faults = dict.fromkeys(FAULTS, 0)

    def note(self, what: str, row: str, connection: int) -> None:
        with self.lock:
            self.events.append((what, row, connection))

    def fault(self) -> str | None:
        with self.lock:
            [kind] = self.draw.choices([*FAULTS, None], [*FAULTS.values(), 1 - sum(FAULTS.values())])
            if kind is not None:
                self.faults[kind] += 1
            return kind

    def asked_after_an_answer(self) -> list[str]:
        """Rows that were asked about although the client had their answer.

        It had none where it closed the connection after the answer: it had given up before.
        """
        last = {connection: place for place, (_, _, connection) in enumerate(self.events)}
        received, again = set(), []
        for what, row, connection in self.events:
            if what == "asked" and row in received:
                again.append(row)
            if what == "answered" and self.events[last[connection]][0] != "closed":
                received.add(row)
        return again


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer
    row = ""

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client has gone
            super().handle()
        self.server.note("closed", self.row, id(self))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.row = body["query"][0]
        self.server.note("asked", self.row, id(self))
        match self.server.fault():
            case "error":
                self._send(500, b"out of order")
            case "hang":
                select.select([self.connection], [], [], 30)  # until the client has had enough
                self.close_connection = True
            case "too many":
                self._send(429, b"slowly", {"Retry-After": "0.05"})
            case "malformed":
                self._send(200, b'{"rewards": [0.5')
            case _:
                said = body["query"][0].removeprefix(body["prompts"][0])
                self.server.note("answered", self.row, id(self))
                self._send(200, json.dumps({"rewards": letters([said])}).encode())

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def faulty_server() -> Iterator[FaultyServer]:
    with FaultyServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def rewarded(reward: Any, **arguments: Any) -> RewardObjective:
    return RewardObjective(reward, completer=Generate(max_new_tokens=3), **arguments)


def fit(folder: Path, opt: Path, rows: Path, objective: Any) -> Any:
    """The weights after a run of 200 steps."""
    module = module_of(opt, objective, max_skipped_steps=STEPS)
    trainer = trainer_of(folder, STEPS, limit_val_batches=0, callbacks=[RunRecorder()])
    trainer.fit(module, data_of(rows))
    return weights(model_of(module))


@pytest.mark.slow
def test_a_run_on_a_faulty_server_is_one_on_a_sound_reward_with_its_masks(
    tmp_path: Path, opt: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "_FIRST_PAUSE", 0.01)
    with faulty_server() as server:
        url = f"http://127.0.0.1:{server.server_address[1]}/get_reward"
        reward = HTTPReward(url, limits=Limits(timeout=0.15, attempts=2, first_wait=0.01))
        tuned = fit(tmp_path / "faulty", opt, rows, rewarded(Reward(reward, name="letters")))
        again = server.asked_after_an_answer()
    assert all(server.faults.values()), server.faults
    assert again == []
    records = steps_of(tmp_path / "faulty")
    assert len(records) == STEPS
    left_out = [record for record in records if record.masks and record.skipped is None]
    assert len(left_out) > 10
    assert sum(record.calls.get("failed", 0) for record in records) > 20

    masks = str(tmp_path / "faulty")
    sound = fit(tmp_path / "sound", opt, rows, rewarded(letters, masks=masks))
    assert_same(tuned, sound)
    for one, other in zip(records, steps_of(tmp_path / "sound"), strict=True):
        assert (one.projected_grads, one.masks, one.skipped) == (other.projected_grads, other.masks, other.skipped)
    assert any(any(record.projected_grads) for record in left_out)


class Paid:
    """Counts the rows that it is asked about."""

    per_sample = True
    identity = "paid"

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, completions: list[str]) -> list[float]:
        self.rows += len(completions)
        return letters(completions)


def test_a_second_run_over_the_same_texts_asks_nothing(tmp_path: Path, opt: Path, rows: Path) -> None:
    cache = str(tmp_path / "answers.sqlite")
    tuned, asked = [], []
    for name in ("first", "second"):
        reward = Paid()
        module = module_of(opt, reward_of(reward, cache=cache))
        trainer_of(tmp_path / name, 6, callbacks=[RunRecorder()]).fit(module, data_of(rows))
        tuned.append(weights(model_of(module)))
        asked.append(reward.rows)
    assert asked[0] > 20
    assert asked[1] == 0
    assert_same(*tuned)
    first, second = (steps_of(tmp_path / name) for name in ("first", "second"))
    assert [record.metrics for record in first] == [record.metrics for record in second]
    assert all(record.calls == {"asked": 0.0, "failed": 0.0, "hit_rate": 1.0} for record in second)


def test_masks_need_a_run_of_the_same_rows(tmp_path: Path, opt: Path, rows: Path) -> None:
    with pytest.raises(ValueError, match="holds no steps: give the folder of a run"):
        reward_of(letters, masks=str(tmp_path))
    first = trainer_of(tmp_path / "first", 2, limit_val_batches=0, callbacks=[RunRecorder()])
    first.fit(module_of(opt, reward_of(_one_fails, on_failure="mask")), data_of(rows))
    masks = str(tmp_path / "first")
    assert all(len(record.masks[0]) == 1 for record in steps_of(tmp_path / "first"))
    longer = trainer_of(tmp_path / "longer", 3, limit_val_batches=0)
    with pytest.raises(ValueError, match="has no step 3: that run was shorter"):
        longer.fit(module_of(opt, reward_of(letters, masks=masks)), data_of(rows))
    other = trainer_of(tmp_path / "other", 2, limit_val_batches=0)
    with pytest.raises(ValueError, match="which are not in this run's batch: the two runs need the same data"):
        other.fit(module_of(opt, reward_of(letters, masks=masks)), data_of(rows, seed=1))


def _one_fails(completions: list[str], **_: Any) -> list[float]:
    return [float("nan"), *letters(completions[1:])]
