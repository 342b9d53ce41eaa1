"""The recurrent example: what a GRU writes is tuned by a score without a gradient, and the log gives it back."""

import importlib
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_a_gru_is_tuned_by_what_it_writes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    importlib.import_module("rnn").main(pretraining=60, steps=30)
    said = capsys.readouterr().out
    scores = [float(score) for score in re.findall(r"held-out score ([+-][\d.]+)", said)]
    assert scores[-1] > scores[0] + 0.1, said
    assert "weights are identical" in said
