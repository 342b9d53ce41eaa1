"""Rewards over HTTP against real servers: what is sent, what is made of answers and faults, wrong settings."""

import math
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from http_server import QUICK, SECRET, Asked, Say, ask, lengths, serving

from rewards.http import HTTPReward
from rewards.remote import Limits, RequestFailed, RequestRefused
from rewards.remote.answers import follow, number

ROOT = Path(__file__).parents[2]


# --- what is sent, and how the answer reads ---------------------------------------------------------------------------


def test_openrlhf_wire_both_ways() -> None:
    logged: dict[str, float] = {}

    def answer(asked: Asked) -> Any:
        return {**lengths(asked), "scores": [0.5], "extra_logs": {"words": [float(len(asked.body["query"][0]))]}}

    with serving(answer) as server:
        reward = HTTPReward(f"{server.url}/get_reward", limits=QUICK)
        values = ask(reward, ["ab", "c"], ["x", "yz1"], label=["gold", "old"], log_metric=logged.__setitem__, step=[7])
    assert values == [3.0, 4.0]
    assert sorted(server.bodies, key=str) == [
        {"query": ["xab"], "prompts": ["x"], "labels": ["gold"]},
        {"query": ["yz1c"], "prompts": ["yz1"], "labels": ["old"]},
    ]
    assert {asked.path for asked in server.asked} == {"/get_reward"}
    assert logged == {"words": 3.5}


def test_openrlhf_in_larger_requests_with_a_named_column_of_labels() -> None:
    with serving(lengths) as server:
        reward = HTTPReward(server.url, labels="answers", rows_per_request=2, limits=QUICK)
        assert reward.required_columns == ("answers",)
        assert ask(reward, ["a", "bb", "ccc"], [""] * 3, answers=[["1"], "2", 3]) == [1.0, 2.0, 3.0]
        with pytest.raises(ValueError, match=r"columns \['answers'\]; the data has \['label'\]"):
            ask(reward, ["a"], label=["1"])
    assert sorted(body["labels"] for body in server.bodies if len(body["labels"]) == 1) == [[3]]
    assert [["1"], "2"] in [body["labels"] for body in server.bodies]


def test_empty_labels_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with serving(lengths) as server:
        reward = HTTPReward(server.url, limits=QUICK)
        assert ask(reward, ["a"], [""], labels=["x"]) == [1.0]
        assert not caplog.records
        for _ in range(2):
            assert ask(reward, ["a"], [""], answers=["x"]) == [1.0]
        assert ask(HTTPReward(server.url, limits=QUICK), []) == []
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert [body["labels"] for body in server.bodies] == [["x"], [""], [""]]


def test_nemo_gym_wire_both_ways() -> None:
    def answer(asked: Asked) -> Any:
        text = asked.body["response"]["output"][0]["content"][0]["text"]
        masked = {"mask_sample": True} if text == "unsure" else {}
        return {**asked.body, "reward": float(text == asked.body["expected_answer"]), **masked}

    with serving(answer) as server:
        reward = HTTPReward(f"{server.url}/verify", protocol="nemo_gym", limits=QUICK)
        columns = {"expected_answer": ["4", "5", "6"], "completion_ids": [[1], [2], [3]], "run": "r"}
        values = ask(reward, ["4", "4", "unsure"], finish_reasons=["stop", "length", "stop"], **columns)
    assert values == [1.0, 0.0, None]
    by_prompt = {body["responses_create_params"]["input"][0]["content"]: body for body in server.bodies}
    assert by_prompt["p0 "].keys() == {"responses_create_params", "response", "expected_answer"}
    assert by_prompt["p0 "]["response"]["object"] == "response"
    assert [by_prompt[f"p{place} "]["response"]["status"] for place in (0, 1)] == ["completed", "incomplete"]


def test_nemo_gym_keeps_the_rows_own_parameters_and_reads_a_failure_of_its_judge() -> None:
    own = {"input": [{"role": "user", "content": "from the data"}], "temperature": 1.0}
    failed = {"reward": 0.0, "_ng_failure_class": "judge_failed"}
    with serving(lambda asked: {"reward": 1.0} if asked.number else failed) as server:
        reward = HTTPReward(server.url, protocol="nemo_gym", limits=QUICK)
        assert ask(reward, ["x"], responses_create_params=[own]) == [1.0]
    assert [body["responses_create_params"] for body in server.bodies] == [own, own]


def test_json_by_template_and_path() -> None:
    request = {
        "input": {"messages": [{"role": "user", "content": "{prompt}"}], "text": "Q: {prompt} A: {completion}"},
        "gold": "{answers}",
        "note": "{answers}!",
        "keep": [1, None, "{}"],
    }
    with serving(lambda asked: {"data": [{"a.b": {"score": 0.25}}]}) as server:
        reward = HTTPReward(server.url, protocol="json", request=request, response="/data/0/a.b/score", limits=QUICK)
        assert reward.required_columns == ("answers",)
        assert ask(reward, ["four {prompt}"], ["2+2?"], answers=[["4", 4.5]]) == [0.25]
    assert server.bodies == [
        {
            "input": {
                "messages": [{"role": "user", "content": "2+2?"}],
                "text": "Q: 2+2? A: four {prompt}",  # what comes from a model is never a template
            },
            "gold": ["4", 4.5],
            "note": '["4", 4.5]!',
            "keep": [1, None, "{}"],
        }
    ]


def test_json_by_default_and_in_larger_requests() -> None:
    with serving(lambda asked: {"reward": asked.body["completion"] == "yes"}) as server:
        assert ask(HTTPReward(server.url, protocol="json", limits=QUICK), ["yes", "no"]) == [1.0, 0.0]
    with serving(lambda asked: [len(text) for text in asked.body["texts"]]) as server:
        with pytest.raises(ValueError, match="must be \\{name\\} and nothing else"):
            HTTPReward(server.url, protocol="json", request={"texts": "x {text}"}, rows_per_request=2)
        wrapped = {"texts": "{text}"}
        reward = HTTPReward(server.url, protocol="json", request=wrapped, response="scores", rows_per_request=2)
        server.answer = lambda asked: {"scores": [len(text) for text in asked.body["texts"]]}
        assert ask(reward, ["a", "bb", "ccc"], [""] * 3) == [1.0, 2.0, 3.0]


def test_paths_and_numbers() -> None:
    answer = {"a": [{"b.c": 1, "d/e": {"~": 2}}], "": 3}
    assert follow(answer, "/a/0/b.c") == 1
    assert follow(answer, "/a/0/d~1e/~0") == 2
    assert follow({"a": {"b": [5, 6]}}, "a.b.1") == 6
    for path in ("a.1", "a.x", "nothing", "a.0.b.c"):
        with pytest.raises(RequestFailed, match="without"):
            follow(answer, path)
    assert [number(value) for value in (1, 0.5, True)] == [1.0, 0.5, 1.0]
    for value in (None, "1", math.nan, math.inf, 10**400, [1.0], {}):
        assert isinstance(number(value), RequestFailed)


# --- faults -----------------------------------------------------------------------------------------------------------


def test_faults_of_every_kind_are_asked_again_and_answered_rows_are_not() -> None:
    """Errors, 429 with Retry-After, malformed answers, twice in five: all rows get their own value."""
    generator, lock, good = random.Random(3), threading.Lock(), Counter[str]()
    faults = [
        Say("down", 503), Say("", 500), Say("", 408), Say("", 425), Say("slow down", 429, {"Retry-After": "0.05"}),
        Say("<html>"), Say("{"), Say({"rewards": []}), Say({"rewards": [1.0, 2.0]}), Say({"rewards": 1.0}), Say([]),
        Say('{"rewards": [NaN]}'), Say('{"rewards": [null]}'), Say({"reward": [1.0]}), Say("[" * 100_000),
        Say({"rewards": ["1"]}),
    ]  # fmt: skip

    def answer(asked: Asked) -> Any:
        with lock:
            fault = generator.choice(faults) if generator.random() < 0.4 else None
            good.update([] if fault else asked.body["query"])
        return fault or lengths(asked)

    limits = Limits(attempts=20, first_wait=0.01, longest_wait=0.1)
    with serving(answer) as server:
        texts = ["x" * length for length in range(60)]
        assert ask(HTTPReward(server.url, limits=limits), texts, [""] * 60) == [float(place) for place in range(60)]
    assert set(good.values()) == {1}
    assert len(server.asked) > 75


def test_a_request_that_hangs_is_made_again() -> None:
    with serving(lambda asked: Say(hang=True) if asked.number == 1 else lengths(asked)) as server:
        assert ask(HTTPReward(server.url, limits=Limits(timeout=1.5)), ["a", "bb", "ccc"], [""] * 3) == [1.0, 2.0, 3.0]
    assert sorted(Counter(body["query"][0] for body in server.bodies).values()) == [1, 1, 2]


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_a_status_that_may_pass_is_asked_again(status: int) -> None:
    with serving(lambda asked: lengths(asked) if asked.number else Say("", status)) as server:
        assert ask(HTTPReward(server.url, limits=QUICK), ["a"]) == [4.0]


@pytest.mark.parametrize(
    ("say", "cause"),
    [
        (Say("busy", 503), "status 503 .*busy"),
        (Say("oops"), "no JSON: 'oops'"),
        (Say({"rewards": [1.0, 2.0]}), "2 values for 1 rows"),
        (Say({"rewards": [math.nan]}), "nan where a finite number is needed"),
        (Say({"other": 1}), "without 'rewards'"),
        (Say(hang=True), "no answer within 1 s"),
    ],
)
def test_what_remains_unanswered_is_the_rows_exception_with_its_cause(say: Say, cause: str) -> None:
    limits = Limits(timeout=1.0, attempts=2, first_wait=0.01)
    with serving(lambda asked: say if asked.body["query"] == ["p1 bad"] else lengths(asked)) as server:
        values = ask(HTTPReward(server.url, limits=limits), ["good", "bad", "good"])
    assert [values[0], values[2]] == [7.0, 7.0]
    with pytest.raises(RequestFailed, match=cause) as failure:
        raise values[1]
    assert server.url in str(failure.value)
    assert len(str(failure.value)) < 400
    assert Counter(body["query"][0] for body in server.bodies) == {"p0 good": 1, "p1 bad": 2, "p2 good": 1}


def test_answered_rows_of_a_larger_request_are_not_asked_again() -> None:
    def answer(asked: Asked) -> Any:
        values = lengths(asked)["rewards"]
        return {"rewards": [None if asked.number == 0 and value == 2.0 else value for value in values]}

    with serving(answer) as server:
        reward = HTTPReward(server.url, rows_per_request=3, limits=QUICK)
        assert ask(reward, ["a", "bb", "ccc"], [""] * 3) == [1.0, 2.0, 3.0]
    assert [body["query"] for body in server.bodies] == [["a", "bb", "ccc"], ["bb"]]


def test_a_server_that_is_not_there_is_a_failure_of_every_row() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        reward = HTTPReward(f"http://127.0.0.1:{unused.getsockname()[1]}", limits=QUICK)
        values = ask(reward, ["a", "b"])
    assert all(isinstance(value, RequestFailed) and "ConnectError" in str(value) for value in values)


@pytest.mark.parametrize("header", ["0.3", "date"])
def test_retry_after_holds_for_all_rows(header: str) -> None:
    """After a 429 with Retry-After nothing is sent before that time, by no row."""
    times: list[float] = []

    def answer(asked: Asked) -> Any:
        times.append(time.time())
        # A date has whole seconds: the next second, and one more.
        until = header if header != "date" else formatdate(math.floor(time.time()) + 2, usegmt=True)
        return Say("", 429, {"Retry-After": until}) if asked.number == 0 else lengths(asked)

    limits = Limits(attempts=3, first_wait=0.01, concurrency=1, longest_wait=5)
    with serving(answer) as server:
        values = ask(HTTPReward(server.url, limits=limits), ["a", "b"], ["", ""])
    assert values == [1.0, 1.0]
    assert len(times) == 3
    assert times[1] - times[0] >= (0.29 if header != "date" else 0.9)


def test_a_service_that_wants_to_be_left_alone_for_long_fails_its_rows_at_once() -> None:
    with serving(lambda asked: Say("", 429, {"Retry-After": "3600"})) as server:
        reward = HTTPReward(server.url, limits=Limits(concurrency=1, longest_wait=5))
        values = ask(reward, ["a", "b", "c"])
    assert all(isinstance(value, RequestFailed) for value in values)
    assert "wants no request for 3" in str(values[-1])
    assert len(server.asked) == 1


# --- settings that are wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 422, 308])
def test_other_statuses_are_errors_of_configuration_at_once(status: int) -> None:
    with (
        serving(lambda asked: Say("no such model", status, {"Location": "http://elsewhere/"})) as server,
        pytest.raises(ValueError, match=f"status {status}.*(no such model|http://elsewhere/)"),
    ):
        ask(HTTPReward(server.url, limits=QUICK), ["a"])
    assert len(server.asked) == 1


@pytest.mark.parametrize(("status", "raises"), [(400, False), (413, False), (422, False), (401, True), (404, True)])
def test_a_row_that_is_refused_after_others_were_answered_fails_alone(status: int, raises: bool) -> None:
    with serving(lambda asked: Say("", status) if "long" in asked.body["query"][0] else lengths(asked)) as server:
        reward = HTTPReward(server.url, limits=QUICK)
        assert ask(reward, ["a"]) == [4.0]
        if raises:
            with pytest.raises(RequestRefused):
                ask(reward, ["a", "too long"])
        else:
            good, refused = ask(reward, ["a", "too long"])
            assert good == 4.0
            assert isinstance(refused, RequestRefused)
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "127.0.0.1:5000"}, "write the whole address"),
        ({"url": []}, "at least one address"),
        ({"url": f"https://me:{SECRET}@host/x"}, "url of host holds a secret"),
        ({"url": f"https://host/x?api_key={SECRET}"}, "url of host holds a secret"),
        ({"protocol": "grpc"}, "use openrlhf, nemo_gym or json"),
        ({"request": {"a": "{completion}"}}, "goes with protocol 'json', not with 'openrlhf'"),
        ({"protocol": "json", "labels": "answers"}, "goes with protocol 'openrlhf'"),
        ({"protocol": "json", "request": {"a": "{prompt}"}}, "must have {completion}"),
        ({"protocol": "nemo_gym", "rows_per_request": 2}, "rows_per_request=2"),
        ({"rows_per_request": 0}, "rows_per_request=0"),
        ({"limits": {"attempts": 2}}, "must be a Limits"),
        ({"api_key_env": "NO_SUCH_KEY"}, "api_key_env=NO_SUCH_KEY: there is no such environment variable"),
        ({"api_key_env": SECRET}, "Give the name of a variable, not the key"),
        ({"headers_from_env": {"X-Key": "NO_SUCH_KEY"}}, "headers_from_env['X-Key']=NO_SUCH_KEY"),
    ],
)
def test_settings_are_checked_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the message is compared below)
        HTTPReward(**{"url": "http://127.0.0.1:1/x", **settings})
    assert message in str(error.value)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("name", ["timeout", "attempts", "concurrency", "requests_per_minute", "longest_wait", "rest"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        Limits(**{name: 0})


def test_a_column_that_json_cannot_hold_is_said() -> None:
    reward = HTTPReward("http://127.0.0.1:1/x", protocol="nemo_gym", limits=QUICK)
    with pytest.raises(ValueError, match="what JSON cannot hold"):
        ask(reward, ["a"], picture=[object()])
    with pytest.raises(ValueError, match="what JSON cannot hold"):
        ask(reward, ["a"], score=[math.nan])


def test_the_example_server_answers() -> None:
    command = [sys.executable, "examples/reward_server.py", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            reward = HTTPReward(server.stdout.readline().strip(), labels="answers", limits=QUICK)
            assert ask(reward, ["a red ball", "red"], answers=[["red ball"], ["blue"]]) == [1.0, 0.0]
        finally:
            server.terminate()
