"""ConMeZO in real runs: resumed and replayed to the same bytes, or refused before a model is loaded."""

import functools
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_same, data_of, model_of, module_of, replayed, steps_taken, trainer_of, weights

from mezo_lightning import Cone, CrossEntropy, MeZO, MeZOModule, Pretrained, Trail


def cone(opt: Path) -> Any:
    optimizer = functools.partial(MeZO, lr=1e-4, update=Trail(0.9, window=2))
    return module_of(opt, optimizer=optimizer, estimator=Cone(1e-2))


def test_resumes_and_replays_to_the_same_bytes(tmp_path: Path, opt: Path, rows: Path):
    """Also where the log has steps beyond the checkpoint: they are measured anew."""
    whole, start, rest = cone(opt), cone(opt), cone(opt)
    trainer_of(tmp_path / "whole", 4).fit(whole, data_of(rows))
    tuned = weights(model_of(whole))
    assert [len(step.terms) for step in steps_taken(tmp_path / "whole")] == [1, 2, 3, 3]
    assert_same(weights(replayed(tmp_path / "whole", opt)), tuned)
    trainer = trainer_of(tmp_path / "parts", 2)
    trainer.fit(start, data_of(rows))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    (tmp_path / "parts/trajectory.bin").write_bytes((tmp_path / "whole/trajectory.bin").read_bytes())
    again = trainer_of(tmp_path / "parts", 4)
    again.fit(rest, data_of(rows), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    assert_same(weights(model_of(rest)), tuned)
    assert (tmp_path / "parts/trajectory.bin").read_bytes() == (tmp_path / "whole/trajectory.bin").read_bytes()


def test_without_an_optimizer_that_remembers_it_is_refused_before_a_model_is_loaded():
    with pytest.raises(ValueError, match=r"estimator=Cone looks around .* give the optimizer `update: Trail`"):
        MeZOModule(Pretrained("nowhere"), CrossEntropy(), estimator=Cone())
