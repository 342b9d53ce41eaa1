"""What a slow reward adds to a probe: `python benchmarks/reward_latency.py`.

A reward takes 200 ms for each completion, and a probe has 16 of them. Measured is how long the reward keeps a probe
waiting, in calls of 200 ms, for the ways in which such a reward can be written; and whether a second run over the same
texts asks anything at all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mezo_lightning.data.batch import Batch
from mezo_lightning.rewarding.rewards import Rewards
from rewards.http import HTTPReward

LATENCY = 0.2
SAMPLES = 16
LIMIT = 1.3
"""Calls that a probe may wait for."""

calls = 0


async def compute_score(data_source: str, solution_str: str, ground_truth: str) -> float:
    """Called for each row, as verl does."""
    global calls
    calls += 1
    await asyncio.sleep(LATENCY)
    return float(len(solution_str) + len(ground_truth))


class Judge:
    """Called once, as TRL does, and asks about all rows at the same time."""

    per_sample = True
    remote = True
    identity = "judge of the benchmark"

    async def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        """The length of each."""
        return await asyncio.gather(*(self._ask(text) for text in completions))

    async def _ask(self, text: str) -> float:
        global calls
        calls += 1
        await asyncio.sleep(LATENCY)
        return float(len(text))


class SlowServer(ThreadingHTTPServer):
    """Takes as many connections at once as a probe makes."""

    daemon_threads = True
    request_queue_size = 4 * SAMPLES


class SlowAnswers(BaseHTTPRequestHandler):
    """OpenRLHF's protocol, a row at a time."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        """Say how many rows were asked about."""
        self._send(json.dumps(calls))

    def do_POST(self) -> None:
        """Answer after a while."""
        global calls
        calls += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(LATENCY)
        self._send(json.dumps({"rewards": [float(len(text)) for text in body["query"]]}))

    def _send(self, content: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content.encode())

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def serve(port: Any) -> None:
    """Run the server in this process, for ever."""
    with SlowServer(("127.0.0.1", 0), SlowAnswers) as server:
        port.put(server.server_address[1])
        server.serve_forever()


@contextmanager
def another_process() -> Iterator[str]:
    """The address of the server, in a process of its own: it is not its work that is measured."""
    fork = multiprocessing.get_context("fork")
    port = fork.Queue()
    process = fork.Process(target=serve, args=(port,))
    process.start()
    try:
        yield f"http://127.0.0.1:{port.get(timeout=60)}/get_reward"
    finally:
        process.terminate()
        process.join()


def calls_so_far(url: str | None) -> int:
    """Of this process, or of the server."""
    if url is None:
        return calls
    with urllib.request.urlopen(url) as answer:
        return json.load(answer)


def probes(count: int) -> list[tuple[Batch, list[str]]]:
    """Batches with completions, none of which repeat."""
    index = tuple(range(SAMPLES))
    prompts = tuple(f"Question {i}" for i in index)
    batch = Batch(index, prompts, None, None, None, {"ground_truth": ("x",) * SAMPLES, "labels": ("x",) * SAMPLES})
    return [(batch, [f"answer {probe} {i}" for i in index]) for probe in range(count)]


def measure(make: Callable[[], Any], url: str | None, count: int, folder: str) -> dict[str, float]:
    """Time one kind of reward, in calls: at the median, the fastest, and the first probe, which connects."""
    before = calls_so_far(url)
    cache = str(Path(folder) / "answers.sqlite")
    rewards, waits = Rewards(make(), cache=cache), []
    for batch, completions in probes(count):
        started = time.perf_counter()
        result = rewards(batch, completions)
        waits.append((time.perf_counter() - started) / LATENCY)
        assert not result.failed.any()
    asked = calls_so_far(url) - before
    assert asked == count * SAMPLES, asked
    again = Rewards(make(), cache=cache)
    for batch, completions in probes(count):
        again(batch, completions)
    return {
        "median": statistics.median(waits),
        "fastest": min(waits),
        "first": waits[0],
        "calls": asked,
        "second_run_calls": calls_so_far(url) - before - asked,
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--probes", type=int, default=10)
    count = parser.parse_args().probes
    with ExitStack() as stack:
        url = stack.enter_context(another_process())
        kinds: dict[str, tuple[Callable[[], Any], str | None]] = {
            "async, a call a row": (lambda: compute_score, None),
            "async, a call a batch": (Judge, None),
            "HTTP, a request a row": (lambda: HTTPReward(url), url),
        }
        print(f"{SAMPLES} completions a probe, {LATENCY * 1000:.0f} ms each; {count} probes; limit: {LIMIT} calls")
        for name, (make, where) in kinds.items():
            found = measure(make, where, count, stack.enter_context(tempfile.TemporaryDirectory()))
            verdict = "ok" if found["median"] <= LIMIT and not found["second_run_calls"] else "TOO SLOW"
            print(
                f"{name:24} {found['median']:5.2f} calls a probe "
                f"(fastest {found['fastest']:.2f}, first {found['first']:.2f}); {found['calls']} calls, "
                f"{found['second_run_calls']} in a second run over the same texts: {verdict}"
            )


if __name__ == "__main__":
    main()
