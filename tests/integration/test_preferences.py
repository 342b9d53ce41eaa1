"""Runs that are told only which of two completions is better."""

import functools
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from helpers import (
    EPSILON,
    Command,
    Watch,
    assert_same,
    data_of,
    model_of,
    module_of,
    replayed,
    reward_of,
    steps_of,
    steps_taken,
    trainer_of,
    weights,
    write_config,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from mezo_lightning import Generate, MeZO, MeZOModule, Pretrained
from mezo_lightning.estimators import CentralDifference, Comparison, Estimator, Ranking
from mezo_lightning.objectives.preference import PreferenceObjective
from mezo_lightning.reporting.records import RunRecords
from rewards.pairwise import ByScore
from rewards.reward_model import RewardModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]

GENERATE = Generate(max_new_tokens=6)


def vowels(text: str) -> float:
    return sum(1.0 if letter in "aeiou" else -0.5 for letter in text)


def prefers_vowels(prompts: Sequence[str], first: Sequence[str], second: Sequence[str]) -> list[float]:
    scores = [(vowels(a), vowels(b)) for a, b in zip(first, second, strict=True)]
    return [float((a > b) - (a < b)) for a, b in scores]


def module(
    model: Path, oracle: Any = prefers_vowels, *, lr: float = 1e-2, queries: int = 1, **options: Any
) -> MeZOModule:
    objective = PreferenceObjective(oracle, GENERATE, **options)
    return module_of(model, objective, estimator=Comparison(EPSILON, queries), optimizer=functools.partial(MeZO, lr=lr))


def test_votes_alone_win_over_the_base_model(tmp_path: Path, opt: Path, rows: Path):
    """On rows held out, nine of ten completions are better in the oracle's eyes than before the first step."""
    trainer = trainer_of(tmp_path, 30, num_sanity_val_steps=-1, val_check_interval=30, check_val_every_n_epoch=None)
    watch = Watch()
    trainer.callbacks.append(watch)  # pyright: ignore[reportAttributeAccessIssue]
    tuned = module(opt, win_rate=True)
    trainer.fit(tuned, data_of(rows, num_validation=8, batch_size=8))
    assert float(trainer.callback_metrics["val/win_rate"]) >= 0.9
    [later] = trainer_of(tmp_path / "later", 1).validate(tuned, data_of(rows, num_validation=8), verbose=False)
    assert "val/win_rate" not in later, "whoever has not seen the model before has nothing to compare with"
    assert later["val/win_rate/known"] == 0.0
    for record in watch.records:
        assert abs(record.projected_grads[0]) <= 1
        assert record.metrics["preference"] == pytest.approx(-record.projected_grads[0])
        assert record.calls.get("asked", 0.0) == 8 * record.metrics["preference/asked"]
    assert_same(weights(model_of(tuned)), weights(replayed(tmp_path, opt)))


@pytest.mark.parametrize("estimator", [Comparison(EPSILON, num_queries=2), Ranking(EPSILON, num_points=3)], ids=repr)
def test_scores_do_as_well_where_only_their_order_counts(estimator: Estimator, tmp_path: Path, opt: Path, rows: Path):
    """The votes of an oracle that compares a reward's scores are the signs of that reward's differences."""
    pairs = {
        "oracle": PreferenceObjective(ByScore(count_vowels), GENERATE),
        "reward": reward_of(count_vowels),
    }
    steps = {}
    for name, objective in pairs.items():
        tuned = module_of(opt, objective, estimator=estimator)
        trainer_of(tmp_path / name, 5).fit(tuned, data_of(rows, batch_size=8))
        steps[name] = steps_taken(tmp_path / name)
    assert steps["oracle"] == steps["reward"]
    assert any(any(c) for step in steps["oracle"] for _, c in step.terms)


def count_vowels(completions: Sequence[str]) -> list[float]:
    return [vowels(text) for text in completions]


def test_a_run_that_is_resumed_is_the_run_that_was_not(tmp_path: Path, opt: Path, rows: Path):
    def run(folder: Path, steps: int, ckpt: Path | None = None) -> tuple[MeZOModule, float]:
        saver = ModelCheckpoint(folder / "ckpt", "{step}", save_top_k=-1, every_n_train_steps=3)
        tuned = module(opt, queries=2, win_rate=True)
        validating = {"num_sanity_val_steps": -1, "val_check_interval": 2, "check_val_every_n_epoch": None}
        trainer = trainer_of(folder, steps, callbacks=[saver], enable_checkpointing=True, **validating)
        trainer.fit(tuned, data_of(rows), ckpt_path=ckpt and str(ckpt), weights_only=False)
        return tuned, float(trainer.callback_metrics["val/win_rate"])

    whole, rate = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 3)
    resumed, its_rate = run(tmp_path / "parts", 6, tmp_path / "parts/ckpt/step=3.ckpt")
    assert_same(weights(model_of(resumed)), weights(model_of(whole)))
    assert steps_taken(tmp_path / "parts") == steps_taken(tmp_path / "whole")
    assert its_rate == rate != 0.5, "what was written before the first step is in the checkpoint"


class Flaky:
    """Remote; one question in three fails, and one has no opinion."""

    remote = True

    def __call__(self, prompts, first, second, step):
        votes = prefers_vowels(prompts, first, second)
        marks = [sum(map(ord, prompt)) + step for prompt in prompts]
        answers = {0: TimeoutError("too late"), 1: None}
        return [answers.get(mark % 3, vote) if mark % 3 < 2 else vote for mark, vote in zip(marks, votes, strict=True)]


def test_failures_and_skips_are_left_out_and_the_run_goes_on(tmp_path: Path, opt: Path, rows: Path):
    watch, tuned = Watch(), module(opt, Flaky(), queries=2)
    tuned.min_valid_fraction = 0.0
    trainer_of(tmp_path, 6, callbacks=[watch]).fit(tuned, data_of(rows, batch_size=6))
    assert any(record.metrics["preference/failed"] for record in watch.records)
    for record in watch.records:
        assert record.skipped is None or "comparisons have an answer" in record.skipped
        assert record.valid_fraction <= 1 - record.metrics["preference/failed"] + 1e-9
    assert any(record.skipped is None for record in watch.records)


def broken(prompts, first, second, step):
    if step == 2:
        raise LookupError("no such judge")
    return prefers_vowels(prompts, first, second)


def test_a_failure_ends_the_run_of_a_local_oracle_and_leaves_no_trace(tmp_path: Path, opt: Path, rows: Path):
    tuned = module(opt, broken)
    with pytest.raises(RuntimeError, match="LookupError: no such judge"):
        trainer_of(tmp_path, 4).fit(tuned, data_of(rows))
    assert len(steps_taken(tmp_path)) == 2
    assert_same(weights(model_of(tuned)), weights(replayed(tmp_path, opt)))


def test_a_learning_rate_of_zero_leaves_no_trace(tmp_path: Path, opt: Path, rows: Path):
    tuned = module(opt, lr=0.0, queries=2)
    trainer_of(tmp_path, 3).fit(tuned, data_of(rows))
    assert_same(weights(model_of(tuned)), weights(Pretrained(str(opt)).load()))


def needs_gold(prompts, first, second, gold):
    raise AssertionError


def test_what_does_not_fit_is_refused_before_any_work(tmp_path: Path, opt: Path, rows: Path):
    with pytest.raises(ValueError, match=r"estimator=CentralDifference .* use `estimator: Comparison`"):
        module_of("/no/model", PreferenceObjective(prefers_vowels), estimator=CentralDifference())

    with pytest.raises(ValueError, match="needs_gold needs the column 'gold'"):
        trainer_of(tmp_path, 1).fit(module(opt, needs_gold), data_of(rows))


def test_from_yaml(tmp_path: Path, opt: Path, rows: Path, command: Command):
    init_args = {"oracle": "test_preferences.prefers_vowels", "completer": {
        "class_path": "Generate", "init_args": {"max_new_tokens": 6}}, "win_rate": True}  # fmt: skip
    path = write_config(tmp_path / "run.yaml", opt, rows, {"class_path": "PreferenceObjective", "init_args": init_args})
    refused = command("fit", "--config", path, "--run_dir", tmp_path / "refused")
    assert "use `estimator: Comparison`" in refused.code
    config = json.loads(path.read_text())
    config["model"]["estimator"] = {"class_path": "Comparison", "init_args": {"epsilon": EPSILON, "num_queries": 2}}
    path.write_text(json.dumps(config))
    outcome = command("fit", "--config", path, "--run_dir", tmp_path / "run")
    assert outcome.code is None, outcome.output
    records = steps_of(tmp_path / "run")
    assert [record.step for record in records] == [1, 2, 3, 4]
    assert all(0 <= record.metrics["preference/asked"] <= 1 for record in records)
    rates = [validation.metrics.get("win_rate") for validation in RunRecords(tmp_path / "run").validations()]
    assert rates[0] == 0.5, "nothing has changed yet"
    assert all(rate is not None and 0 <= rate <= 1 for rate in rates)
    assert len(rates) == 3
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"preference", "tie_fraction", "val/win_rate"} <= {*header}
    assert not [name for name in header if name.startswith("objective/")], "points have no values where votes count"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "win rate against the start" in page
    assert "nan" not in re.sub(r"<[^>]*>", "", page).lower().split()


@pytest.fixture(scope="module")
def judge_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Tokenizer) -> Path:
    """A tiny reward model."""
    folder = tmp_path_factory.mktemp("judge")
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=128, num_labels=1, bos_token_id=0, pad_token_id=1,
        eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_file, bos_token="<s>", pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_a_reward_model_judges_and_is_not_tuned(
    tmp_path: Path, opt: Path, rows: Path, judge_model: Path, precision: str
):
    reward = RewardModel(str(judge_model), device="cpu")
    before = reward(["Where is 1?"], [" the mill"])
    tuned = module(opt, ByScore(reward, scale=1.0))
    saver = ModelCheckpoint(tmp_path / "ckpt", "{step}")
    trainer = trainer_of(tmp_path, 3, precision=precision, callbacks=[saver], enable_checkpointing=True)
    trainer.fit(tuned, data_of(rows))
    assert reward(["Where is 1?"], [" the mill"]) == before
    assert {p.dtype for p in reward._frozen.model.parameters()} == {torch.float32}
    assert not {id(p) for p in reward._frozen.model.parameters()} & {id(p) for p in tuned.parameters()}
    weights_alone = sum(p.numel() * p.element_size() for p in tuned.parameters())
    [checkpoint] = (tmp_path / "ckpt").glob("*.ckpt")
    assert checkpoint.stat().st_size < weights_alone + 50_000
    assert all(not step.changes_nothing for step in steps_taken(tmp_path))


# -- several processes -------------------------------------------------------------------------------------------------


class CountsQuestions:
    """Writes every question down, with the rank that asks."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, prompts, first, second, step):
        with open(self.path, "a") as file:
            for prompt in prompts:
                file.write(f"{os.environ.get('RANK', '0')} {step} {prompt}\n")
        return prefers_vowels(prompts, first, second)


def preference_fit(*, strategy: str, model: Path, rows: Path, run: Path) -> Any:
    tuned = module(model, CountsQuestions(run.with_suffix(".asked")), win_rate=True)
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = trainer_of(
        run, 3, strategy=jobs.strategy_of(strategy), devices=devices, num_sanity_val_steps=-1, val_check_interval=3,
        check_val_every_n_epoch=None,
    )  # fmt: skip
    trainer.fit(tuned, data_of(rows, batch_size=5, num_validation=2))
    rate = float(trainer.callback_metrics["val/win_rate"])
    return steps_taken(run) if trainer.is_global_zero else None, trainer.optimizers[0].digest, rate  # pyright: ignore


def inside_zero_init(*, model: Path) -> Any:
    """Scores of a reward model that is loaded while DeepSpeed cuts up whatever is made."""
    import deepspeed
    import torch.distributed as dist

    dist.init_process_group("gloo")
    kernels: dict[str, bool] = deepspeed.ops.__compatible_ops__
    kernels["deepspeed_shm_comm"] = False  # which would be compiled
    deepspeed.init_distributed(dist_init_required=False)
    reward = RewardModel(str(model), device="cpu")
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=config):
        with torch.device("cpu"):
            torch.zeros(1)  # by which torch comes to remember DeepSpeed's functions instead of its own
        scores = reward(["Where is 1?"], [" the mill"])
        ours = torch.nn.Linear(2, 2)
    cut = [any("ds_id" in vars(p) for p in part.parameters()) for part in (reward._frozen.model, ours)]
    return scores, cut


def main(environment: dict[str, str], folder: Path, function: str, arguments: dict[str, Any]) -> None:
    vars(jobs)[function] = globals()[function]
    jobs._main(environment, folder, function, arguments)


@pytest.mark.slow
def test_two_processes_ask_once_and_make_the_steps_of_one(
    tmp_path: Path, opt: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(jobs, "_main", main)
    alone = preference_fit(strategy="one", model=opt, rows=rows, run=tmp_path / "one")
    asked = sorted((tmp_path / "one.asked").read_text().splitlines())
    assert {line.split()[1] for line in asked} == {"0", "1", "2", "3"}
    # Where layers are gathered one by one, ranks have to stay in step while rank zero asks.
    run = tmp_path / "layer"
    found = jobs.run_job("preference_fit", 2, tmp_path / "job", strategy="layer", model=opt, rows=rows, run=run)
    zero, one = jobs.succeeded(found)
    assert sorted(run.with_suffix(".asked").read_text().splitlines()) == asked, "by rank zero, and once"
    assert zero == alone
    assert one[1:] == alone[1:]


@pytest.mark.slow
def test_a_reward_model_is_not_sharded_by_accident(tmp_path: Path, judge_model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "_main", main)
    [(scores, cut)] = jobs.succeeded(jobs.run_job("inside_zero_init", 1, tmp_path / "job", model=judge_model))
    assert scores == pytest.approx(RewardModel(str(judge_model), device="cpu")(["Where is 1?"], [" the mill"]))
    assert cut == [False, True]
