"""benchmarks/reward_families.py in small: each kind of reward has its say in a run of the demo's model."""

import re
import runpy
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from helpers import mezo

from mezo_lightning.reporting.records import RunRecords

ROOT = Path(__file__).parents[2]


def fit(words: Sequence[str]) -> None:
    done = mezo("fit", *words)
    assert done.code is None, done.output


@pytest.mark.slow
@pytest.mark.parametrize("family", ["http", "tool", "person"])
def test_two_steps(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if family == "person":
        pytest.importorskip("starlette", reason="mezo judge needs the extra `judge`")
        pytest.importorskip("playwright.sync_api", reason="the page is clicked through playwright")
        if not Path("/usr/bin/chromium").exists():
            pytest.skip("/usr/bin/chromium is not installed (Debian's package chromium)")
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "reward_families.py"))
    words = ["--families", family, "--steps", "2", "--rows", "6", "--runs", str(tmp_path), "--data.batch_size", "8"]
    benchmark["main"]([*words, "--model.estimator.init_args.num_queries", "1"], fit)
    run = tmp_path / family
    steps = RunRecords(run).steps()
    assert len(steps) == 2
    assert all(step.valid_fraction == 1.0 and step.skipped is None for step in steps)
    assert sum(step.calls["asked"] for step in steps) > 0
    assert sum(step.calls["failed"] for step in steps) == 0
    assert any(any(step.projected_grads) for step in steps)
    found = re.search(r"^\| [^|]+ \| (0\.\d+) \| (0\.\d+) \| [+-]0\.\d+ \| 2 \|", capsys.readouterr().out, re.MULTILINE)
    assert found
    if family == "person":
        with closing(sqlite3.connect(tmp_path / "person.sqlite")) as votes:
            [count] = votes.execute("SELECT count(*) FROM vote").fetchone()
        assert count >= sum(step.calls["asked"] for step in steps)
        return
    validations = RunRecords(run).validations()
    if family == "http":  # the server's reward is F1 too
        assert [float(value) for value in found.groups()] == pytest.approx(
            [validation.metrics["reward"] for validation in validations], abs=6e-4
        )
