"""Classes named on the command line and in files: their defaults, their help, and the sentence for a mistake."""

import dataclasses
import inspect
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import Command, Outcome

import mezo_lightning
from mezo_lightning.estimators import Estimator
from mezo_lightning.samplers import Sampler
from mezo_lightning.transforms import Transform
from mezo_lightning.updates import Update

NEEDED: dict[str, dict[str, Any]] = {
    "Chain": {"transforms": [{"class_path": "Sign"}]}, "Clip": {"limit": 1.0}, "Scaled": {"scales": {"bias": 2.0}},
}  # fmt: skip
OBJECTIVE = {"class_path": "CrossEntropy"}


def public(base: type) -> list[str]:
    """The public classes of a kind that can be named."""
    found = [getattr(mezo_lightning, name) for name in mezo_lightning.__all__]
    return [each.__name__ for each in found if inspect.isclass(each) and issubclass(each, base) and each is not base]


def own_defaults(name: str) -> dict[str, Any]:
    """The defaults of a class, as a configuration has them."""
    parameters = inspect.signature(getattr(mezo_lightning, name)).parameters
    defaults = {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}
    return {key: as_config(value) for key, value in defaults.items()}


def as_config(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return value
    given = {field.name: as_config(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return {"class_path": f"mezo_lightning.{type(value).__name__}"} | ({"init_args": given} if given else {})


def in_file(folder: Path, name: str = "config.yaml", **model: Any) -> Path:
    """A file that has what is needed, and these parts of the model."""
    needed = {"pretrained": {"name": "embedded/opt-stories"}, "objective": OBJECTIVE}
    data = {"train": "embedded/stories/train.jsonl", "prompt": "{question}", "target": " {answers[0]}"}
    (folder / name).write_text(json.dumps({"model": needed | model, "data": data}))
    return folder / name


def printed(done: Outcome) -> dict[str, Any]:
    assert done.code == 0, done
    return yaml.safe_load(done.output)["model"]


KINDS = {Estimator: "estimator", Transform: "transform", Sampler: "sampler", Update: "update"}
TOGETHER = list(itertools.zip_longest(*map(public, KINDS)))


@pytest.mark.parametrize("names", TOGETHER)
def test_classes_named_alone_have_their_own_defaults(names: tuple[str | None, ...], command: Command, tmp_path: Path):
    chosen = {field: name for field, name in zip(KINDS.values(), names, strict=True) if name}
    specs = {field: {"class_path": name, "init_args": NEEDED.get(name, {})} for field, name in chosen.items()}
    within = {field: specs.pop(field) for field in ("sampler", "update") if field in specs}
    model = {**specs, "optimizer": {"class_path": "MeZO", "init_args": within}}
    words: list[str] = []
    for field, name in chosen.items():
        option = f"--model.{'optimizer.' if field in within else ''}{field}"
        words += [option, name, *(f"{option}.{key}={json.dumps(value)}" for key, value in NEEDED.get(name, {}).items())]
    nothing, overlay = in_file(tmp_path), tmp_path / "overlay.yaml"
    overlay.write_text(json.dumps({"model": model}))
    file = in_file(tmp_path, "one.yaml", **model)
    for given in (["--config", file], ["--config", nothing, *words], ["--config", nothing, "--config", overlay]):
        found = printed(command("fit", *given, "--print_config"))
        for field, name in chosen.items():
            got = found["optimizer"]["init_args"][field] if field in within else found[field]
            assert got["class_path"].rpartition(".")[2] == name
            needed = NEEDED.get(name, {})
            settings = {key: value for key, value in got.get("init_args", {}).items() if key not in needed}
            assert settings == own_defaults(name), given


def test_every_public_part_is_tried():
    """So the test above says something."""
    assert {"FZOO", "Population", "Clip", "Scaled", "Subset", "ScalarAdam"} <= {
        name for row in TOGETHER for name in row
    }


@pytest.mark.parametrize("words", [["--model.estimator", "FZOO"], ["--config", "{overlay}"]])
def test_settings_that_somebody_has_written_are_kept(words: list[str], command: Command, tmp_path: Path):
    written = in_file(tmp_path, estimator={"class_path": "CentralDifference", "init_args": {"num_queries": 4}})
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("model: {estimator: {class_path: FZOO}}")
    filled = [word.format(overlay=overlay) for word in words]
    assert printed(command("fit", "--config", written, *filled, "--print_config"))["estimator"] == {
        "class_path": "mezo_lightning.FZOO", "init_args": {"epsilon": 1e-3, "num_queries": 4}
    }  # fmt: skip


def test_a_class_that_replaces_one_named_without_settings_has_its_own(command: Command, tmp_path: Path):
    first = in_file(tmp_path, estimator={"class_path": "CentralDifference"})
    found = printed(command("fit", "--config", first, "--model.estimator", "FZOO", "--print_config"))
    assert found["estimator"]["init_args"] == own_defaults("FZOO")
    nothing = in_file(tmp_path)
    found = printed(command("fit", "--config", nothing, "--model.estimator.num_queries", 3, "--print_config"))
    assert found["estimator"]["init_args"] == own_defaults("CentralDifference") | {"num_queries": 3}


def test_what_nobody_names_has_its_defaults(command: Command, tmp_path: Path):
    found = printed(command("fit", "--config", in_file(tmp_path), "--print_config"))
    assert found["estimator"]["init_args"] == own_defaults("CentralDifference")
    assert found["optimizer"]["init_args"] == own_defaults("MeZO")


def test_null_is_null_at_any_depth(command: Command, tmp_path: Path):
    words = ["--model.optimizer.sampler", "LowRank", "--model.optimizer.sampler.core", "dense"]
    words += ["--model.optimizer.sampler.refresh_left", "null"]
    found = printed(command("fit", "--config", in_file(tmp_path), *words, "--print_config"))
    assert found["optimizer"]["init_args"]["sampler"]["init_args"]["refresh_left"] is None


def optimizer(**settings: Any) -> list[str]:
    return ["--model.optimizer", json.dumps({"class_path": "MeZO", "init_args": settings})]


TIMED = {"class_path": "RewardObjective", "init_args": {"reward": {"function": "rewards.squad.f1", "timeout": -1}}}
LOW_RANK = ["--model.optimizer.sampler", "LowRank"]
LINEAR = ["--model.lr_scheduler", "torch.optim.lr_scheduler.LinearLR"]


@pytest.mark.parametrize(("words", "wanted"), [
    (["--model.optimizer.sampler", "LOZO"], "model.optimizer.sampler='LOZO' is unknown: choose "),
    (optimizer(sampler="LOZO"), "model.optimizer.sampler='LOZO' is unknown: choose "),
    (optimizer(sampler={"class_path": "LowRang"}), "; did you mean LowRank?"),
    ([*LOW_RANK, "--model.optimizer.sampler.rang", "3"], "model.optimizer.sampler: LowRank has no 'rang'; it has rank"),
    (optimizer(sampler={"class_path": "LowRank", "init_args": {"rang": 3}}), "LowRank has no 'rang'; it has rank"),
    (optimizer(sampler={"class_path": "Subset", "init_args": {"order": "rand"}}),
     "model.optimizer.sampler.order='rand' is unknown: choose random, cyclic; did you mean random?"),
    (optimizer(sampler={"class_path": "Scaled", "init_args": {"scales": {"a": 3}}}), "Scaled(scales={'a': 3.0}) must"),
    (optimizer(sampler={"class_path": "Subset", "init_args": {"blocks": "("}}), " is no regular expression: mis"),
    (optimizer(sampler={"class_path": "Scaled"}), "model.optimizer.sampler: Scaled needs scales"),
    (optimizer(lr="fast"), "model.optimizer.lr='fast' is not a number"),
    (["--model.optimizer", "Adam"], "model.optimizer='Adam' is unknown: choose MeZO, for other optimizers need"),
    (["--model.optimizer.learning_rate", "1"], "model.optimizer: MeZO has no 'learning_rate'; it has lr, weight_decay"),
    (["--model.optimizer.update", "Adam"], "model.optimizer.update='Adam' is unknown: choose DenseAdam"),
    (["--model.objective", json.dumps(TIMED)], "timeout=-1.0 must be a positive number of seconds"),
    (["--model.estimator", "FZO"], "model.estimator='FZO' is unknown: choose CentralDifference"),
    (["--model.estimator", "torch.optim.SGD"], "model.estimator='torch.optim.SGD' is unknown (does not correspond to"),
    (["--model.estimator", "nowhere.Thing"], "model.estimator='nowhere.Thing' is unknown (No module named 'nowhere')"),
    (["--model.transform", "Clip"], "model.transform: Clip needs limit"),
    (["--model.lr_scheduler", "LinearR"], "; did you mean LinearLR?"),
    ([*LINEAR, "--model.lr_scheduler.begin", "3"], "model.lr_scheduler: LinearLR has no 'begin'; it has start_factor"),
    (["--model.evaluator", "magic"], "model.evaluator='magic' is unknown: choose auto, leaf_scratch, copy"),
    (["--data.batchsize", "3"], "there is no option data.batchsize; data has train, prompt,"),
    (["--trainer.callbacks+=EarlyStoping"], "; did you mean EarlyStopping?"),
    (["--model.optimizer.sampler.help", "Foo"], "model.optimizer.sampler='Foo' is unknown: choose "),
])  # fmt: skip
def test_a_mistake_is_one_sentence(words: list[str], wanted: str, command: Command, tmp_path: Path):
    done = command("fit", "--config", in_file(tmp_path), "--run_dir", tmp_path / "run", *words)
    said = str(done.code)
    assert said.startswith("mezo: error: "), done
    assert wanted in said
    assert said.isprintable(), "more than one line"
    assert len(said) < 320
    assert not any(word in said for word in ("Namespace", "Union", "NestedArg", "typing."))


def test_what_a_command_needs(command: Command):
    said = str(command("fit").code)
    assert said.startswith("mezo: error: mezo fit needs model.pretrained.name, model.objective, data.train, data.prom")
    assert "there is no option trajectry; did you mean trajectory?" in str(command("replay", "--trajectry", "x").code)


def test_a_mistake_in_a_file(command: Command, tmp_path: Path):
    path = in_file(tmp_path, bogus=3)
    assert "there is no option model.bogus; model has pretrained," in str(command("fit", "--config", path).code)
    path = in_file(tmp_path, optimizer={"class_path": "MeZO", "init_args": {"sampler": {"class_path": "LOZO"}}})
    said = str(command("fit", "--config", path).code)
    assert said.startswith("mezo: error: model.optimizer.sampler='LOZO' is unknown: choose ")


@pytest.mark.parametrize(("words", "name"), [
    (["--model.transform.help", "Standardize"], "Standardize"),
    (["--model.transform.help", "Sign"], "Sign"),
    (["--model.estimator.help", "FZOO"], "FZOO"),
    (["--model.optimizer.help", "MeZO"], "MeZO"),
    (["--model.optimizer.help", "MeZO", "--model.optimizer.sampler.help", "LowRank"], "LowRank"),
    (["--model.optimizer.help", "MeZO", "--model.optimizer.sampler.help", "Gaussian"], "Gaussian"),
])  # fmt: skip
def test_the_help_of_a_class_is_its_docstring(words: list[str], name: str, command: Command):
    done = command("fit", *words)
    assert done.code == 0
    described = inspect.getdoc(getattr(mezo_lightning, name))
    assert described is not None
    assert described.partition("\n\nArgs:")[0] in done.output
    settings = [key for key in own_defaults(name) if key != "params"]
    assert all(f".{key} " in done.output for key in settings)
