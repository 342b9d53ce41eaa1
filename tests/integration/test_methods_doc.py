"""What docs/methods.md says of each method: its YAML runs, with the forward passes and the lr that the table has."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import EPSILON, Command, Watch, data_of, steps_of, trainer_of, write_config
from jsonargparse import ActionConfigFile, ArgumentParser

import mezo_lightning
from mezo_lightning import MeZOModule
from mezo_lightning.estimators import Estimator
from mezo_lightning.samplers import Sampler
from mezo_lightning.transforms import Identity, Transform
from mezo_lightning.tuning.units import units_of
from mezo_lightning.updates import Update

PAGE = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| \[.+", PAGE, re.MULTILINE)]
TABLE = {row[0].partition("]")[0].strip("["): row for row in ROWS}
BLOCKS = dict(re.findall(r"^```yaml\n# ([^\n]+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
METHODS = list(BLOCKS)
LR, BATCH_SIZE = 1e-3, 4  # of `write_config`


def settings(name: str) -> dict[str, Any]:
    """What the formulas of a method's row may refer to."""
    model = yaml.safe_load(BLOCKS[name])["model"]
    given = [model.get(part, {}).get("init_args", {}) for part in ("estimator", "transform")]
    return {"epsilon": EPSILON, "lr": LR, "batch_size": BATCH_SIZE, "sqrt": math.sqrt} | given[0] | given[1]


@pytest.fixture
def configs(name: str, tmp_path: Path, opt: Path, rows: Path) -> list[str]:
    """A run's configuration, with the method on top of it."""
    base = write_config(tmp_path / "run.yaml", opt, rows, {"class_path": "CrossEntropy"})
    (tmp_path / "method.yaml").write_text(BLOCKS[name])
    return [f"--config={base}", f"--config={tmp_path / 'method.yaml'}"]


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_class_arguments(MeZOModule, "model", instantiate=False)
    parser.add_argument("--data", type=dict)
    parser.add_argument("--trainer", type=dict)
    return parser


def test_every_row_has_its_yaml_and_its_section():
    assert list(TABLE) == METHODS
    assert PAGE.count("```yaml") == len(METHODS)
    headings = [re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in re.findall(r"^## (.+)", PAGE, re.M)]
    sections = dict(zip(headings, PAGE.split("\n## ")[1:], strict=True))
    for name, (link, *_) in TABLE.items():
        assert f"# {name}\n" in sections[link.partition("#")[2].rstrip(")")], name


def test_every_part_of_a_method_is_on_the_page():
    public = [getattr(mezo_lightning, name) for name in mezo_lightning.__all__]
    kinds = (Estimator, Sampler, Update, Transform)
    parts = [part for part in public if isinstance(part, type) and issubclass(part, kinds) and part is not Identity]
    assert len(parts) > 20
    assert [part.__name__ for part in parts if f"`{part.__name__}`" not in PAGE] == []


def check_size(lr: str, moved: float | None, names: dict[str, Any]) -> None:
    """Hold how far the first step moved a weight against the formula of a row, if it has one."""
    if formula := re.fullmatch(r"(at least |at most |about |)`(.+)`", lr):
        stated = eval(formula[2], names)
        bounds = {"at least ": (0.999, math.inf), "at most ": (0, 1.001), "about ": (0.8, 1.25), "": (0.999, 1.001)}
        low, high = bounds[formula[1]]
        assert moved is not None
        assert low * stated <= moved <= high * stated
    else:
        assert "`" not in lr


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_what_its_row_says(
    name: str, configs: list[str], parser: ArgumentParser, tmp_path: Path, rows: Path
):
    """Its parts, the forward passes of its steps, and whether lr has the unit of plain MeZO's; or how far a step is."""
    _, parts, passes, lr, *_ = TABLE[name]
    number, _, formula = passes.partition(" = ")
    assert not formula or eval(formula.strip("`"), settings(name)) == int(number)
    parsed = parser.parse_args(configs)
    assert [part for part in re.findall(r"`(\w+)", parts) if part not in str(parsed.model)] == []
    arguments = parser.instantiate_classes(parsed).model
    module = MeZOModule(**vars(arguments) | {"startup_checks": False})
    optimizer = arguments.optimizer([("layers.0.weight", torch.nn.Parameter(torch.randn(4, 4)))])
    assert (optimizer.defaults["lr"], module.estimator.epsilon) == (LR, EPSILON)
    units = units_of(optimizer, module.estimator, module.transform)
    assert lr.startswith("MeZO's") == (units.other_units == ())
    assert lr.startswith("MeZO's,") == (not units.moves_all_alike)
    if name == "QZO":
        return  # test_scales.py has runs of it
    watch = Watch()
    trainer_of(tmp_path / "run", 2, callbacks=[watch], limit_val_batches=0).fit(module, data_of(rows))
    assert [len(step.objective) for step in watch.records] == [int(number)] * 2
    assert [step.skipped for step in watch.records] == [None] * 2
    check_size(lr, watch.records[0].update_rms, settings(name))


@pytest.mark.parametrize("name", ["FZOO", "SubZero", "Standardising"])  # an overlay of each option
def test_the_command_makes_the_same_of_it(name: str, configs: list[str], tmp_path: Path, command: Command):
    done = command("fit", *configs, f"--run_dir={tmp_path / 'run'}", "--trainer.max_steps=2")
    assert done.code is None, done.output
    steps = steps_of(tmp_path / "run")
    assert [len(step.objective) for step in steps] == [int(TABLE[name][2].split()[0])] * 2
    check_size(TABLE[name][3], steps[0].update_rms, settings(name))
