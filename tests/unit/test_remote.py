"""What remote rewards share, against real servers: limits, fail-over, secrets, event loops."""

import asyncio
import copy
import json
import logging
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from http_server import QUICK, SECRET, Asked, Say, ask, lengths, serving

from rewards.http import HTTPReward
from rewards.remote import Keys, Limits, RequestFailed
from rewards.remote.endpoints import Endpoints
from rewards.remote.limits import Pace

ROOT = Path(__file__).parents[2]


# --- limits and several servers ---------------------------------------------------------------------------------------


def test_sixteen_slow_rows_are_asked_at_once_over_kept_connections() -> None:
    together = threading.Barrier(16)

    def answer(asked: Asked) -> Any:
        together.wait(20)  # passes only when 16 requests are here at once
        return lengths(asked)

    with serving(answer) as server:
        assert ask(HTTPReward(server.url, limits=Limits(attempts=1)), ["a"] * 16) == [4.0] * 10 + [5.0] * 6
    assert server.most_under_way == 16


def test_no_more_requests_at_once_than_allowed_and_connections_are_used_again() -> None:
    connections = set[int]()

    def answer(asked: Asked) -> Any:
        connections.add(threading.get_ident())
        time.sleep(0.02)
        return lengths(asked)

    async def twice(reward: HTTPReward) -> None:
        for _ in range(2):
            await reward(["p"] * 12, ["a"] * 12)

    with serving(answer) as server:
        asyncio.run(twice(HTTPReward(server.url, limits=Limits(concurrency=3))))
    assert server.most_under_way == 3
    assert len(server.asked) == 24
    assert len(connections) <= 3


def test_rates_hold() -> None:
    """Of 120 a minute 12 may come at once; the next one half a second later."""
    times: list[float] = []

    def answer(asked: Asked) -> Any:
        times.append(time.monotonic())
        return lengths(asked)

    with serving(answer) as server:
        ask(HTTPReward(server.url, limits=Limits(requests_per_minute=120)), ["a"] * 13)
    times.sort()
    assert times[12] - times[0] > 0.1


@pytest.mark.parametrize("per_minute", [1, 7, 60, 90, 300])
def test_a_minute_never_sees_more_than_its_rate(per_minute: int) -> None:
    async def passes() -> list[float]:
        pace, clock = Pace(per_minute), asyncio.get_running_loop()
        start, found = clock.time(), []
        for _ in range(2 * per_minute + 2):
            await pace.wait(1)
            found.append(clock.time() - start)
        return found

    times = run_without_waiting(passes())
    for start in times:
        assert sum(start <= time < start + 60 - 1e-3 for time in times) <= per_minute
    assert times[-1] < 60 * 2.6 + 60


def test_tokens_are_paced_even_where_one_request_has_more_than_pass_at_once() -> None:
    async def last() -> float:
        pace, clock = Pace(600), asyncio.get_running_loop()
        start = clock.time()
        for _ in range(3):
            await pace.wait(400.0)
        return clock.time() - start

    assert run_without_waiting(last()) == pytest.approx((1200 - 60) / (541 / 60), rel=0.01)


def run_without_waiting(coroutine: Any) -> Any:
    """Runs it on a loop whose clock all but stands still, and jumps to the next timer."""
    loop = asyncio.SelectorEventLoop()
    now, select = loop.time(), loop._selector.select  # type: ignore[attr-defined]

    def jump(timeout: float | None = None) -> Any:
        nonlocal now
        now += (timeout or 0.0) + 1e-7  # a wait that rounding left over would never end
        return select(0)

    loop.time = lambda: now
    loop._selector.select = jump  # type: ignore[attr-defined]
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


def test_other_servers_take_over_from_one_that_fails() -> None:
    with serving(lambda asked: Say("", 500)) as broken, serving(lengths) as one, serving(lengths) as other:
        reward = HTTPReward([broken.url, one.url, other.url], limits=Limits(first_wait=0.01, rest=60))

        async def calls() -> list[list[Any]]:
            return [await reward(["p"] * 12, [str(call)] * 12) for call in range(4)]

        assert asyncio.run(calls()) == [[2.0] * 12] * 4
    assert len(broken.asked) <= 12  # those under way when it was found out, and no more later
    assert min(len(one.asked), len(other.asked)) >= 12


def test_endpoints_rest_recover_and_share() -> None:
    now = 0.0
    endpoints = Endpoints(["a", "b"], rest=10.0, clock=lambda: now)

    def fail(**reason: Any) -> str:
        with pytest.raises(RequestFailed) as failure, endpoints.ask() as endpoint:
            raise RequestFailed(endpoint.url, **reason)
        return str(failure.value)

    def answer() -> str:
        with endpoints.ask() as endpoint:
            return endpoint.url

    with endpoints.ask() as one, endpoints.ask() as other:
        assert {one.url, other.url} == {"a", "b"}  # the least busy
    assert [fail(), fail(), answer(), fail(), fail(), fail()] == ["a"] * 6  # three in a row, and not before
    assert answer() == "b"
    assert fail(unreachable=True) == "b"  # at once
    assert answer() == "a"  # both rest: better than nothing
    now = 10.5
    assert fail(retry_after=5.0) == "a"
    assert answer() == "b"
    assert endpoints.closed_for() == 0.0
    fail(retry_after=2.0)
    assert endpoints.closed_for() == pytest.approx(2.0)
    now = 13.0
    assert answer() == "b"


# --- secrets, identity, loops -----------------------------------------------------------------------------------------


def test_keys_reach_the_server_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", f"{SECRET}\n")
    monkeypatch.setenv("MY_HEADER", "Key other-secret-98765")

    def answer(asked: Asked) -> Any:
        status = 503 if "failing" in asked.body["query"][0] else 401 if "wrong" in asked.body["query"][0] else 200
        told = f"{'x' * 190} your key {SECRET} and {asked.headers['X-Team']}"
        return (
            Say(told, status)
            if status != 200
            else {"rewards": [told]}
            if "odd" in asked.body["query"][0]
            else lengths(asked)
        )

    with serving(answer) as server:
        reward = HTTPReward(
            server.url, api_key_env="MY_KEY", headers_from_env={"X-Team": "MY_HEADER"},
            limits=Limits(attempts=2, first_wait=0.01),
        )  # fmt: skip
        values = ask(reward, ["fine", "failing", "odd"])
        with pytest.raises(ValueError, match="401") as refused:
            ask(reward, ["wrong"])
    assert server.asked[0].headers["Authorization"] == f"Bearer {SECRET}"
    assert server.asked[0].headers["X-Team"] == "Key other-secret-98765"
    assert isinstance(values[1], RequestFailed)
    assert "[hidden]" in str(values[1])
    said = [repr(reward), str(reward), reward.identity, *map(repr, values), *map(str, values), repr(refused.value)]
    said += [repr(pickle.dumps(thing)) for thing in (reward, values, refused.value)]
    said += [repr(vars(error)) + repr(error.__cause__) + repr(error.__context__) for error in values[1:]]
    said += [repr(vars(reward)), repr(vars(reward._service)), caplog.text]
    for text in said:
        assert SECRET not in text
        assert "other-secret" not in text
        assert SECRET[:20] not in text


def test_keys_are_read_again_where_a_reward_is_sent_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "first-key")
    with serving(lengths) as server:
        reward = HTTPReward(server.url, api_key_env="MY_KEY", limits=QUICK)
        assert ask(reward, ["a"]) == [4.0]
        for twin in (pickle.loads(pickle.dumps(reward)), copy.deepcopy(reward)):
            assert twin.identity == reward.identity
            assert ask(twin, ["a"]) == [4.0]
    assert Keys(headers_from_env={"X": "MY_KEY"}).headers() == {"X": "first-key"}


def test_identity_says_what_decides_a_value_and_nothing_else() -> None:
    base: dict[str, Any] = {"url": "http://a/x"}
    same = [base, {**base, "rows_per_request": 4}, {**base, "limits": Limits(timeout=3)}, {"url": ["http://a/x"]}]
    assert len({HTTPReward(**settings).identity for settings in same}) == 1
    others = [
        {"url": "http://b/x"}, {**base, "labels": "l"}, {**base, "protocol": "nemo_gym"}, {**base, "version": "2"},
        {**base, "protocol": "json"}, {**base, "protocol": "json", "response": "a"},
        {**base, "protocol": "json", "request": {"a": "{text}"}},
    ]  # fmt: skip
    assert len({HTTPReward(**settings).identity for settings in [base, *others]}) == 1 + len(others)
    json.loads(HTTPReward(**base).identity.removeprefix("rewards.http.HTTPReward(").removesuffix(")"))


def test_one_reward_serves_several_loops() -> None:
    with serving(lengths) as server:
        reward = HTTPReward(server.url, limits=QUICK)
        assert [ask(reward, ["a"]), ask(reward, ["bb"])] == [[4.0], [5.0]]
        found: list[Any] = []
        threads = [threading.Thread(target=lambda: found.append(ask(reward, ["ccc"] * 4))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [[6.0] * 4] * 3


def test_a_cancelled_call_leaves_no_request_behind() -> None:
    with serving(lambda asked: Say(hang=True)) as server:
        reward = HTTPReward(server.url, limits=Limits(timeout=30))

        async def cancelled() -> int:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(reward(["p"] * 3, ["a"] * 3), 0.3)
            return len(asyncio.all_tasks())

        assert asyncio.run(cancelled()) == 1
    assert len(server.asked) == 3
