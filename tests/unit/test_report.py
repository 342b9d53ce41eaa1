"""The report says what happened, shows untrusted text as text, keeps secrets, and needs nothing from outside."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mezo_lightning import GRZO, Population, estimators
from mezo_lightning.reporting.outcome import headline_metric, judge, resolution
from mezo_lightning.reporting.records import RunInfo, RunRecords, SampleRecord, StepRecord, ValidationRecord
from mezo_lightning.reporting.redaction import redact, redact_command
from mezo_lightning.reporting.report import duration, prompt_tail, sample_pairs, size, write_report


def step(number: int, **changes) -> StepRecord:
    record = StepRecord(
        step=number,
        objective={"q0+": -0.5, "q0-": -0.3},
        projected_grads=[-100.0 + number],
        lr=[1e-3],
        valid_fraction=1.0,
        tie_fraction=0.5,
        identical_fraction=0.25,
        probes_per_second=10.0,
        skipped=None,
        metrics={"reward": 0.4, "rewards/f1": 0.4},
    )
    return replace(record, **changes)


def flat(number: int) -> StepRecord:
    return step(number, projected_grads=[0.0], tie_fraction=1.0, identical_fraction=1.0)


def skipped(number: int) -> StepRecord:
    return step(
        number, objective={}, projected_grads=[], metrics={}, valid_fraction=0.0, skipped="non-finite objective"
    )


def rewards(*values: float, every: int = 10, rows: int | None = 500) -> list[ValidationRecord]:
    return [ValidationRecord(i * every, 0.0, {"reward": v, "rewards/f1": v}, rows) for i, v in enumerate(values)]


def losses(*values: float) -> list[ValidationRecord]:
    return [ValidationRecord(i * 10, 0.0, {"objective": v}, 100) for i, v in enumerate(values)]


def vote(number: int) -> StepRecord:
    """A step by comparison: points have no values."""
    metrics = {"preference": 0.2, "preference/asked": 0.5, "preference/failed": 0.0}
    return step(number, objective={}, projected_grads=[-0.2], metrics=metrics, calls={"asked": 8.0, "failed": 0.0})


def win_rates(*values: float, rows: int = 100, known: float = 1.0) -> list[ValidationRecord]:
    return [ValidationRecord(10 * i, 0.0, {"win_rate": v, "win_rate/known": known}, rows) for i, v in enumerate(values)]


STEPS = [step(i) for i in range(1, 21)]
VOTES = [vote(i) for i in range(1, 21)]


@pytest.mark.parametrize(
    ("steps", "validations", "verdict", "headline"),
    [
        (STEPS, rewards(0.36, 0.5, 0.85), "better", "Held-out F1 rose from 0.360 to 0.850."),
        (STEPS, rewards(0.85, 0.36), "worse", "It got worse: held-out F1 fell from 0.850 to 0.360."),
        (
            STEPS,
            rewards(0.52, 0.53),
            "unchanged",
            "No measurable change: held-out F1 was 0.520 before and is 0.530 now.",
        ),
        (STEPS, losses(2.0, 1.5), "better", "Held-out objective fell from 2.000 to 1.500."),
        (STEPS, losses(1.5, 2.0), "worse", "It got worse: held-out objective rose from 1.500 to 2.000."),
        (STEPS, losses(2.0, 1.995), "unchanged", "No measurable change"),
        (VOTES, win_rates(0.5, 0.7, 0.8), "better", "Held-out win rate against the start rose from 0.500 to 0.800."),
        (VOTES, win_rates(0.5, 0.3), "worse", "It got worse: held-out win rate against the start fell from 0.500"),
        (VOTES, win_rates(0.5, 0.53), "unchanged", "No measurable change: held-out win rate against the start was"),
        (
            STEPS,
            rewards(0.651, 0.505, rows=8),
            "unchanged",
            "Too few held-out rows (8) to tell: F1 was 0.651 before and is 0.505 now.",
        ),
        (STEPS, rewards(2.0, 2.009), "unchanged", "No measurable change: held-out F1 was 2.000"),  # no share
        (VOTES, [], "unknown", "20 steps taken, and not measured on held-out rows since"),
        (STEPS, [], "unknown", "20 steps taken, and not measured on held-out rows since"),
        (STEPS, rewards(0.4), "unknown", "20 steps taken, and not measured on held-out rows since"),
        (
            STEPS,
            rewards(0.1, 0.4)[1:],
            "unknown",
            "Held-out F1 is 0.400; what it was before training was not measured.",
        ),
        (
            [flat(1), flat(2)],
            rewards(0.5, 0.5),
            "nothing",
            "Nothing was learned: in all 2 steps every pair of probes tied",
        ),
        ([skipped(1), skipped(2)], rewards(0.5), "nothing", "Nothing was learned: all 2 steps were skipped."),
        (
            [skipped(1), flat(2)],
            rewards(0.5, 0.9),
            "nothing",
            "Nothing was learned: in all 1 steps that were not skipped",
        ),
        ([], rewards(0.5), "nothing", "No step was taken."),
        ([], [], "nothing", "No step was taken."),
    ],
)
def test_headline_says_what_happened(steps, validations, verdict, headline):
    outcome = judge(steps, validations)
    assert outcome.verdict == verdict
    assert outcome.headline.startswith(headline)


def test_a_change_counts_only_where_so_many_rows_can_tell():
    few, many = rewards(0.5, 0.6, rows=20), rewards(0.5, 0.6, rows=2000)
    assert judge(STEPS, few).verdict == "unchanged"
    assert judge(STEPS, many).verdict == "better"
    assert resolution("reward", *many) == pytest.approx(2 * 0.5 / 2000**0.5)
    assert resolution("reward", *rewards(0.0, 0.0, rows=100)) > 0
    assert resolution("win_rate", *win_rates(0.5, 1.0, rows=100)) == pytest.approx(0.1)  # two sd of 100 coins
    assert resolution("win_rate", *win_rates(0.5, 1.0, rows=400, known=0.25)) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("steps", "validations", "words"),
    [
        ([step(i) if i % 2 else flat(i) for i in range(1, 101)], rewards(0.1, 0.9), "In 50 of 100 steps every pair"),
        ([flat(i) for i in range(1, 6)], [], "In all 5 steps every pair of probes tied"),
        ([*STEPS, skipped(21)], rewards(0.1, 0.9), "1 of 21 steps skipped: non-finite objective (1)."),
        ([step(1, valid_fraction=0.75)], rewards(0.1, 0.9), "25.0% of the samples were left out"),
        (
            [step(1, tie_fraction=0.95, identical_fraction=0.9)],
            [],
            "95% of the samples tied at both probes of a pair, and 90%",
        ),
        (
            [step(1, tie_fraction=0.95, identical_fraction=None)],
            [],
            "95% of the samples tied at both probes of a pair. What",
        ),
        (STEPS, rewards(0.3, 0.9, 0.6), "Held-out F1 was best at step 10 (0.900) and ended at 0.600."),
        (STEPS, losses(2.0, 1.0, 1.5), "Held-out objective was best at step 10 (1.000) and ended at 1.500."),
        (STEPS, rewards(0.3, 0.9)[1:], "trainer.num_sanity_val_steps=-1"),
        (STEPS, rewards(0.651, 0.505, rows=8), "a difference in F1 of up to 0.354 can be chance"),
        (VOTES, [], "win_rate: true in the PreferenceObjective"),
        (VOTES, win_rates(0.5, 0.9, known=0.25), "25 of 100 held-out rows have a win rate"),
        (VOTES, win_rates(0.5, 0.9, 0.6), "Held-out win rate against the start was best at step 10 (0.900)"),
    ],
)
def test_notes_say_what_to_know(steps, validations, words):
    notes = judge(steps, validations).notes
    assert sum(words in note for note in notes) == 1, notes


def test_a_clean_run_has_no_notes():
    assert judge(STEPS, rewards(0.3, 0.6, 0.9)).notes == ()
    assert judge(VOTES, win_rates(0.5, 0.7, 0.9)).notes == ()


def test_the_run_is_judged_by_its_reward_and_named_after_its_only_component():
    both = [ValidationRecord(0, 0.0, {"objective": 1.0, "accuracy": 0.5})]
    assert headline_metric([], both) == "accuracy"
    assert headline_metric(STEPS, []) == "reward"
    assert headline_metric([step(1, metrics={})], []) == "objective"
    assert judge(STEPS, rewards(0.5)).label == "F1"
    assert judge(STEPS, [ValidationRecord(0, 0.0, {"objective": 1.5, "loss": 1.5})]).label == "loss"
    assert judge(STEPS, [ValidationRecord(0, 0.0, {"objective": 1.5, "loss": 1.4})]).label == "objective"
    two = [ValidationRecord(0, 0.0, {"reward": 1.0, "rewards/f1": 0.5, "rewards/format": 0.5})]
    assert judge([step(1, metrics={})], two).label == "reward"


@pytest.mark.parametrize(
    ("tree", "expected"),
    [
        ({"hf_token": "abc"}, {"hf_token": "[hidden]"}),
        (
            {"args": [{"api_key": "a"}, {"Authorization": "b"}]},
            {"args": [{"api_key": "[hidden]"}, {"Authorization": "[hidden]"}]},
        ),
        ({"url": "https://me:pw@host/v1"}, {"url": "https://[hidden]@host/v1"}),
        ({"note": "use hf_abcdefghijklmnop now"}, {"note": "use [hidden] now"}),
    ],
)
def test_secrets_are_hidden(tree, expected):
    assert redact(tree) == expected


def test_what_is_no_secret_is_shown():
    tree = {
        "max_new_tokens": 50,
        "bos_token_id": None,
        "stop": ["\n"],
        "name": "monkey",
        "tokenizer": "opt",
        "api_keys": 3,
    }
    assert redact(tree) == tree


def test_secrets_are_hidden_in_a_command_line():
    command = ["mezo", "fit", "--reward.api_key", "abc", "--a.token=xyz", "--lr=1", "--config", "c.yaml"]
    hidden = ["mezo", "fit", "--reward.api_key", "[hidden]", "--a.token=[hidden]", "--lr=1", "--config", "c.yaml"]
    assert redact_command(command) == hidden


INFO = RunInfo(
    command="mezo fit --config a.yaml",
    model="embedded/opt-stories",
    parameters=1_234_567,
    trainable_parameters=1_000,
    dtype="bfloat16",
    device="cpu, 2 threads",
    versions={"torch": "2.13.0"},
    started="2026-01-01T00:00:00+00:00",
    replay_command="mezo replay --trajectory run --output run/replayed",
    status="interrupted",
    planned_steps=99,
    wall_seconds=3723.0,
    peak_memory_bytes=3 * 2**30,
    notes=("Stopped by hand after step 20.",),
)
EVIL = "<script>alert(1)</script><img src=https://evil.example/x onerror=alert(1)> {{ 7 * 7 }} & \x00"


def run_folder(folder: Path, steps, validations, *, info: RunInfo | None = INFO, samples=()) -> Path:
    records = RunRecords(folder)
    for record in (*steps, *validations, *samples):
        records.append(record)
    if info:
        records.write_info(info)
    return folder


class Page(HTMLParser):
    """Checks that tags are balanced, and collects them."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(svg)
    return text, Page(text)


KINDS = [
    (STEPS, rewards(0.3, 0.6, 0.9)),
    ([step(1)], rewards(0.3)),
    ([step(1)], []),
    ([], rewards(0.3)),
    ([], []),
    (VOTES, win_rates(0.5, 0.9)),
    (VOTES, []),
    ([flat(i) for i in range(1, 30)], rewards(0.3, 0.3)),
    ([skipped(i) for i in range(1, 30)], rewards(0.3, 0.3)),
    ([step(i, metrics={"accuracy": 0.5}, identical_fraction=None) for i in range(1, 9)], losses(2.0, 1.0)),
    (
        [step(i, metrics={}, objective={}) for i in range(1, 9)],
        [ValidationRecord(0, 0.0, {}), ValidationRecord(8, 1.0, {})],
    ),
    (
        [step(i, objective={"q0+": float("nan")}, tie_fraction=float("nan")) for i in range(1, 9)],
        rewards(float("nan")),
    ),
]
# What is known of a run beside its records changes no figure: without it, three kinds tell enough.
WITHOUT_INFO = [(STEPS, rewards(0.3, 0.6, 0.9), None), ([], rewards(0.3), None), ([], [], None)]


@pytest.mark.parametrize(("steps", "validations", "info"), [*((*kind, INFO) for kind in KINDS), *WITHOUT_INFO])
def test_every_kind_of_run_gives_a_whole_page_that_needs_nothing_else(tmp_path, steps, validations, info):
    run_folder(tmp_path, steps, validations, info=info)
    if not (steps or validations or info):
        with pytest.raises(FileNotFoundError, match="no records of a run"):
            write_report(tmp_path)
        return
    text, page = read(write_report(tmp_path))
    assert judge(steps, validations, info).headline in page.text
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "img", "iframe", "object"}
        assert "src" not in attributes
        assert (attributes.get("href") or attributes.get("xlink:href") or "#").startswith("#")
    assert not re.search(r"url\((?!#)|@import", text)
    assert "nan" not in page.text.lower()
    assert re.search(r"#0102\w\w", text) is None, "a stand-in colour was left in a figure"


def test_the_page_shows_what_a_person_wants_to_know(tmp_path):
    samples = [
        SampleRecord(s, 0, "Story: x\nQuestion: y", c, {"reward": r}) for s, c, r in ((0, "long", 0.5), (20, "b", 1))
    ]
    run_folder(tmp_path, STEPS, rewards(0.36, 0.85, every=20), samples=samples)
    (tmp_path / "config.yaml").write_text("model:\n  hf_token: abcdef\n  epsilon: 0.001\n")
    (tmp_path / "trajectory.bin").write_bytes(b"x" * 2048)
    text, page = read(write_report(tmp_path))
    for words in (
        "0.360 → 0.850", "20 of 99", "1 h 02 min", "3.0 GiB", "embedded/opt-stories", "Stopped by hand after step 20.",
        INFO.replay_command, "epsilon: 0.001", "hf_token: '[hidden]'", "2.0 KiB for 20 steps", "0.50 → 1.00",
        "bfloat16", "mean over 500 held-out rows", "prefers-color-scheme",
    ):  # fmt: skip
        assert words in page.text, words
    assert "abcdef" not in text


def test_what_rewards_said_of_a_completion_stands_below_it(tmp_path):
    notes = {0: {"f1/why": "<b>wrong</b>", "f1/n": 0.5}, 20: {"f1/why": "x" * 500}}
    samples = [SampleRecord(step, 0, "p", f"text {step}", {"reward": 0.5}, note) for step, note in notes.items()]
    _, page = read(write_report(run_folder(tmp_path, STEPS, rewards(0.5, 0.5, every=20), samples=samples)))
    assert "f1/why: <b>wrong</b>" in page.text
    assert "f1/n: 0.500" in page.text
    assert "x" * 200 in page.text
    assert "x" * 300 not in page.text


def test_a_run_by_votes_is_shown_in_votes(tmp_path):
    rates = ((0, 0.5), (1, 1.0), (2, 0.0), (3, 0.5), (4, float("nan")))
    samples = [
        SampleRecord(s, i, f"prompt {i}", f"text {s}", {"win_rate": rate if s else 0.5})
        for i, rate in rates
        for s in (0, 20)
    ]
    _, page = read(write_report(run_folder(tmp_path, VOTES, win_rates(0.5, 0.75, 0.9), samples=samples)))
    for words in ("Win rate against the start", "0.500 → 0.900", "Comparisons", "160", "a tie counts half"):
        assert words in page.text, words
    assert "Probes" not in page.text
    assert "running mean" not in page.text, "training has no win rate"
    assert [row.better for row in sample_pairs(samples, "win_rate")] == ["tie", "now", "before", "tie", "none"]
    cells = [dict(attributes).get("data-name") for tag, attributes in page.tags if tag == "td"]
    assert cells.count("Better") == 5
    assert "Score" not in cells
    write_report(run_folder(tmp_path / "partly", VOTES, win_rates(0.5, 0.9, known=0.25)))
    assert "mean over 25 of 100 held-out rows" in (tmp_path / "partly" / "report.html").read_text()


def test_samples_without_scores_have_no_column_for_them(tmp_path):
    samples = [SampleRecord(s, 0, "prompt", f"text {s}", {}) for s in (0, 20)]
    _, page = read(write_report(run_folder(tmp_path, VOTES, [], samples=samples)))
    assert "text 20" in page.text
    assert "Score" not in page.text
    assert "none →" not in page.text


def shown_charts(page: Page) -> list[str | None]:
    return [attributes.get("aria-label") for tag, attributes in page.tags if attributes.get("role") == "img"]


def test_the_projected_gradients_are_explained_by_the_run_itself(tmp_path):
    info = replace(INFO, scalar_meaning="The z-score of a member.")
    _, page = read(write_report(run_folder(tmp_path, STEPS, [], info=info)))
    assert "The z-score of a member. 20 values, 0 of them exactly 0" in page.text


def test_every_estimator_says_what_its_scalars_are():
    kinds = [getattr(estimators, name) for name in estimators.__all__ if name != "Estimator"]
    meanings = [kind().scalar_meaning for kind in kinds]
    assert len(set(meanings)) == len(kinds)
    assert all(meaning.endswith(".") for meaning in meanings)
    assert "scalar_meaning" in set.intersection(*(set(vars(kind)) for kind in kinds)), "the default says too little"
    assert GRZO(normalize=False).scalar_meaning != GRZO().scalar_meaning
    weights = {
        Population(fitness=f, antithetic=a).scalar_meaning for f, a in product(("z_score", "centered_rank"), (0, 1))
    }
    assert len(weights) == 4


@pytest.mark.parametrize(("one_slope", "values"), [(False, 80), (True, 20)])
def test_one_slope_with_several_signs_is_counted_once(tmp_path, one_slope, values):
    steps = [step(i, projected_grads=[-2.0, -2.0, 2.0, 2.0]) for i in range(1, 21)]
    _, page = read(write_report(run_folder(tmp_path, steps, [], info=replace(INFO, one_slope=one_slope))))
    assert f"{values} values, 0 of them exactly 0" in page.text


def test_a_loss_of_targets_is_shown_beside_the_target(tmp_path):
    samples = [
        SampleRecord(s, i, f"prompt {i}", "", {"loss": 2.0 - (s / 20) * (-1) ** i}, target=f" right {i}\n")
        for i in (0, 1)
        for s in (0, 20)
    ]
    _, page = read(write_report(run_folder(tmp_path, STEPS, losses(2.0, 1.5), samples=samples)))
    for words in ("Target", "Loss", "right 1", "2.00 → 1.00", "2.00 → 3.00"):
        assert words in page.text, words
    assert "Before" not in page.text
    pairs = sample_pairs(samples, "objective")
    assert [(pair.target, pair.direction) for pair in pairs] == [("right 0", "up"), ("right 1", "down")]


def test_prompts_alone_are_not_shown(tmp_path):
    samples = [SampleRecord(s, 0, "the row", "", {}, target="right") for s in (0, 20)]
    _, page = read(write_report(run_folder(tmp_path, STEPS, losses(2.0, 1.5), samples=samples)))
    assert "the row" not in page.text


def test_a_run_that_failed_before_any_step_has_no_curve_and_nothing_to_replay(tmp_path):
    run_folder(tmp_path, [], rewards(0.5), info=replace(INFO, status="failed"))
    _, page = read(write_report(tmp_path))
    assert shown_charts(page) == []
    assert INFO.replay_command not in page.text
    assert INFO.command in page.text
    _, page = read(write_report(run_folder(tmp_path / "one", [step(1)], rewards(0.5))))
    assert "F1 over the steps" in shown_charts(page)
    assert INFO.replay_command in page.text


def test_the_divergence_from_the_base_is_drawn_beside_the_reward(tmp_path):
    steps = [step(i, metrics={"reward": 0.4, "kl": 0.01 * i}) for i in range(1, 21)]
    validations = [replace(one, metrics={**one.metrics, "kl": 0.1}) for one in rewards(0.3, 0.9)]
    _, page = read(write_report(run_folder(tmp_path, steps, validations)))
    assert {"F1 over the steps", "KL divergence from the base model over the steps"} <= set(shown_charts(page))
    assert judge(steps, validations).label == "F1"


def test_where_nothing_is_completed_the_table_has_scores_only(tmp_path):
    samples = [SampleRecord(s, 0, "the row", "", {"accuracy": s / 20}) for s in (0, 20)]
    validations = [ValidationRecord(s, 0.0, {"accuracy": s / 20}, 100) for s in (0, 20)]
    _, page = read(write_report(run_folder(tmp_path, STEPS, validations, samples=samples)))
    assert "the row" in page.text
    assert "0.00 → 1.00" in page.text
    assert "Now" not in page.text


def test_untrusted_text_is_shown_as_text(tmp_path):
    samples = [SampleRecord(s, 0, EVIL, EVIL + str(s), {"reward": 0.5}) for s in (0, 20)]
    run_folder(tmp_path, STEPS, rewards(0.1, 0.9), samples=samples, info=replace(INFO, model=EVIL, notes=(EVIL,)))
    text, page = read(write_report(tmp_path))
    assert "<script>alert(1)</script>" in page.text
    assert "{{ 7 * 7 }}" in page.text
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img"})
    assert "default-src 'none'" in text


def test_a_long_run_gives_a_small_page(tmp_path):
    steps = [(flat, skipped, step)[i % 3](i + 1) for i in range(6_000)]
    run_folder(tmp_path, steps, rewards(*(0.001 * i for i in range(100)), every=60))
    assert write_report(tmp_path).stat().st_size < 600_000


def test_the_same_run_gives_the_same_page(tmp_path):
    run_folder(tmp_path, STEPS, rewards(0.1, 0.9))
    assert write_report(tmp_path).read_bytes() == write_report(tmp_path).read_bytes()


def test_configuration_that_is_no_plain_yaml_is_left_out(tmp_path):
    run_folder(tmp_path, STEPS, rewards(0.1, 0.9))
    (tmp_path / "config.yaml").write_text("token: !!python/object:x {a: secret-value}\n")
    assert "secret-value" not in write_report(tmp_path).read_text()


def test_samples_are_paired_first_to_last():
    samples = [SampleRecord(s, i, f"p{i}", f"c{s}", {"reward": s / 10}) for s in (0, 5, 10) for i in (2, 4)]
    first, second = sample_pairs(samples, "reward")
    assert (first.prompt, first.before, first.now, first.direction) == ("p2", "c0", "c10", "up")
    assert second.prompt == "p4"
    close = [replace(sample, metrics={"reward": 0.5 + sample.step / 1e4}) for sample in samples]
    assert {pair.direction for pair in sample_pairs(close, "reward")} == {"same"}, "what looks equal has no colour"
    (alone,) = sample_pairs(samples[:1], "reward")
    assert alone.now is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 00 s"), (3599.6, "1 h 00 min"), (7260, "2 h 01 min")],
)
def test_durations_read_well(value, expected):
    assert duration(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0 bytes"), (1023, "1023 bytes"), (2048, "2.0 KiB"), (812 * 2**20, "812 MiB"), (2**40, "1024.0 GiB")],
)
def test_sizes_read_well(value, expected):
    assert size(value) == expected


def test_the_end_of_a_prompt_is_kept():
    assert prompt_tail("short") == "short"
    tail = prompt_tail("word " * 200 + "the question?", 40)
    assert tail.endswith("the question?")
    assert tail.startswith("… word")
