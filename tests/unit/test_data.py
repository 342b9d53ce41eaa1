"""Reading, drawing and rendering rows, and the order in which they are served."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.trainer.states import TrainerFn

from mezo_lightning.data import PromptDataModule
from mezo_lightning.data.batch import Batch
from mezo_lightning.data.data_module import draw
from mezo_lightning.data.loaders import TrainLoader, permutation
from mezo_lightning.data.rows import read_rows, with_split

REAL = Path("/work/shared/data")
ROWS: list[dict[str, Any]] = [
    {"n": number, "question": f"q{number} ", "answers": [f"a{number}", "b"], "label": number % 2}
    for number in range(20)
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write(tmp_path / "rows.jsonl", ROWS)


def batch_of(size: int) -> Batch:
    texts = tuple(str(number) for number in range(size))
    return Batch(tuple(range(size)), texts, None, None, None, {"n": texts})


# --- Batch ------------------------------------------------------------------------------------------------------------


def test_a_batch_splits_into_contiguous_micro_batches(source: str) -> None:
    data = PromptDataModule(source, "{question}", target="{answers[0]}", options=[" x", " y"], label="label")
    data.setup("fit")
    batch = data.splits["train"].select([3, 1, 4, 10, 5])
    parts = batch.split(2)
    assert [part.index for part in parts] == [(3, 1), (4, 10), (5,)]
    assert parts[1].prompts == ("q4", "q10")
    assert parts[1].targets == ("a4", "a10")
    assert parts[1].options == ((" x", " y"), (" x", " y"))
    assert parts[1].answers == (0, 0)
    assert parts[1].columns["answers"] == (["a4", "b"], ["a10", "b"])
    assert batch.split(None) == [batch]
    assert batch.split(5) == [batch]
    with pytest.raises(ValueError, match="micro_batch_size=0"):
        batch.split(0)


def test_lightning_may_rebuild_a_batch_as_its_half_precision_does() -> None:
    from lightning.pytorch.plugins.precision import HalfPrecision

    assert HalfPrecision("bf16-true").convert_input(batch_of(3)) == batch_of(3)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    rows = [{"text": 'a "b", c', "label": 1, "score": 0.5}, {"text": "NA", "label": 0, "score": 2.25}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "data.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "a.tsv").write_text('text\tlabel\tscore\na "b", c\t1\t0.5\nNA\t0\t2.25\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.json", "data.json", "lines.json", "a.jsonl", "a.csv", "a.tsv", "a.parquet"):
        assert read_rows(str(tmp_path / name)) == rows, name


def test_a_text_column_becomes_numbers_only_where_that_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("zip,price,count,mixed,date\n007,1.50,-3,1,2020-01-01\n008,2.00,4,x,2020-01-02\n")
    assert read_rows(str(path))[0] == {"zip": "007", "price": "1.50", "count": -3, "mixed": "1", "date": "2020-01-01"}


def test_a_quotation_mark_in_a_tsv_is_a_character(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"open\t1\nand shut"\t0\n')
    assert [row["text"] for row in read_rows(str(path))] == ['"open', 'and shut"']


def test_rows_of_different_keys_get_the_same_columns(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path / "a.jsonl", [{"a": 1}, {"b": [2]}])) == [
        {"a": 1, "b": None},
        {"a": None, "b": [2]},
    ]


def test_squad_format_is_flattened(tmp_path: Path) -> None:
    path = tmp_path / "squad.json"
    questions = [
        {
            "id": "i",
            "question": "who?",
            "answers": [{"text": "Ann", "answer_start": 0}, {"text": "Ann B.", "answer_start": 0}],
        },
        {"id": "j", "question": "why?", "answers": [], "is_impossible": True},
    ]
    path.write_text(
        json.dumps({"data": [{"title": "T", "paragraphs": [{"context": "Ann B. ran.", "qas": questions}]}]})
    )
    assert read_rows(str(path)) == [
        {"title": "T", "context": "Ann B. ran.", "question": "who?", "answers": ["Ann", "Ann B."], "id": "i"},
        {"title": "T", "context": "Ann B. ran.", "question": "why?", "answers": [], "id": "j"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[", "line 1 is no JSON"),
        ("a.json", '["text"]', "row 1 is 'text', and should be an object"),
        ("a.jsonl", '{"a": 1}\n{"a": ', "line 2 is no JSON"),
        ("a.jsonl", "", "there are no rows"),
        ("a.json", "[]", "there are no rows"),
        ("a.csv", "a,b\n", "there are no rows"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "line 3: there are 3 fields, and the header names 2"),
        ("a.csv", "a,a\n1,2\n", "must name each column once"),
        ("a.csv", "", "there are no rows"),
        ("a.parquet", "PAR", "is no Parquet file"),
        ("a.xlsx", "", "cannot read .xlsx; use .json, .jsonl, .csv, .tsv, .parquet"),
    ],
)
def test_a_bad_file_is_refused_with_one_message(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rows(str(tmp_path / name))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"'nowhere.jsonl' does not exist \(looked at /"):
        read_rows("nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match=r"'embedded/no/such.jsonl' does not exist"):
        read_rows("embedded/no/such.jsonl")


def test_hub_sources() -> None:
    assert with_split("hub:owner/name", "validation") == "hub:owner/name@validation"
    assert with_split("hub:owner/name:config@test", "train") == "hub:owner/name:config@test"
    assert with_split("file.jsonl", "train") == "file.jsonl"
    with pytest.raises(ValueError, match="names no data set and split"):
        read_rows("hub:@train")


def test_the_hub_out_of_reach_is_one_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"hub:no-such-owner/no-such-data:c@train: .*name a local file"):
        read_rows("hub:no-such-owner/no-such-data:c@train")


# --- drawing ----------------------------------------------------------------------------------------------------------


@given(st.integers(6, 60), st.integers(1, 2), st.integers(1, 2), st.integers(0, 2**40))
def test_drawn_splits_are_disjoint_complete_and_repeatable(total: int, validation: int, test: int, seed: int) -> None:
    numbers = {"train": None, "validation": validation, "test": test}
    torch.manual_seed(seed % 7)  # must not matter
    drawn = draw(total, numbers, seed, "x")
    assert {name: len(rows) for name, rows in drawn.items()} == numbers | {"train": total - validation - test}
    assert sorted(row for rows in drawn.values() for row in rows) == list(range(total))
    torch.manual_seed(seed % 5)
    assert draw(total, numbers, seed, "x") == drawn


def test_the_permutation_is_what_it_has_always_been() -> None:
    # A changed draw would silently train on what earlier runs validated with.
    assert permutation(8, 0, "draw") == [5, 7, 1, 2, 4, 6, 3, 0]
    assert permutation(8, 1, "draw") != permutation(8, 0, "draw")
    assert permutation(8, 0, "order") != permutation(8, 0, "draw")
    assert permutation(8, 0, "order", 1) != permutation(8, 0, "order", 0)


def test_the_permutation_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    permutation(100, 3, "order")
    assert torch.equal(torch.get_rng_state(), before)


def test_splits_drawn_from_one_source_share_no_row(source: str, tmp_path: Path) -> None:
    data = PromptDataModule(source, "{n}", num_train=8, num_validation=5, num_test=4, batch_size=2)
    data.setup()
    drawn = {name: data.splits[name].columns["n"] for name in ("train", "validation", "test")}
    assert [len(rows) for rows in drawn.values()] == [8, 5, 4]
    assert len({row for rows in drawn.values() for row in rows}) == 17
    # The same file by another name is the same source.
    again = PromptDataModule(
        source,
        "{n}",
        validation=str(tmp_path / "." / "rows.jsonl"),
        num_train=8,
        num_validation=5,
        num_test=4,
        batch_size=2,
    )
    again.setup()
    assert {name: again.splits[name].columns["n"] for name in drawn} == drawn
    # A stage alone sees the rows that it sees after another.
    alone = PromptDataModule(source, "{n}", num_train=8, num_validation=5, num_test=4)
    alone.setup("test")
    assert alone.splits["test"].columns["n"] == drawn["test"]
    other = PromptDataModule(source, "{n}", num_train=8, num_validation=5, num_test=4, batch_size=2, seed=1)
    other.setup()
    assert other.splits["train"].columns["n"] != drawn["train"]


def test_other_sources_give_all_their_rows_or_a_draw(source: str, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", ROWS[:6])
    data = PromptDataModule(source, "{n}", validation=other, test=other, num_validation=2, num_train=19, batch_size=19)
    data.setup()
    assert len(data.splits["train"]) == 19
    held_out = (*data.splits["validation"].columns["n"], *data.splits["test"].columns["n"])
    assert sorted(held_out) == [0, 1, 2, 3, 4, 5]
    assert data.splits["validation"].index == (0, 1)


def test_without_validation_rows_there_is_no_loader(source: str) -> None:
    data = PromptDataModule(source, "{n}")
    data.setup("fit")
    assert data.val_dataloader() == []
    assert len(data.splits["train"]) == 20
    for stage, message in (
        ("test", "no rows to test: set data.test to"),
        ("predict", "no rows to predict: set data.pre"),
    ):
        with pytest.raises(ValueError, match=message):
            data.setup(stage)


@pytest.mark.parametrize(("stage", "message"), [
    (TrainerFn.TESTING, "There are no rows to test: set data.test to a source, or data.num_test"),
    (TrainerFn.PREDICTING, "There are no rows to predict: set data.predict to a source"),
])  # fmt: skip
def test_lightnings_names_of_stages_are_not_in_messages(source: str, stage: TrainerFn, message: str) -> None:
    data: Any = PromptDataModule(source, "{n}")
    with pytest.raises(ValueError, match=message):
        data.setup(stage)


def test_predict_needs_no_labels(source: str, tmp_path: Path) -> None:
    bare = write(tmp_path / "bare.jsonl", [{"question": "q"}])
    options = [" x", " y"]
    data = PromptDataModule(
        source, "{question}", predict=bare, target="{answers[0]}", options=options, label="label", num_test=4
    )
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert (batch.prompts, batch.options, batch.targets, batch.answers) == (("q",), ((" x", " y"),), None, None)
    default = PromptDataModule(source, "{question}", num_test=4)
    default.setup("predict")
    assert [len(batch) for batch in default.predict_dataloader()] == [4]


# --- rendering --------------------------------------------------------------------------------------------------------


def test_prompts_targets_and_columns(tmp_path: Path) -> None:
    row = {"title": "T", "q": "  Who? ", "gold": {"text": ["Ann", "B"]}, "extra": [1]}
    data = PromptDataModule(
        write(tmp_path / "a.jsonl", [row]),
        " {title}\nQ: {q:strip} {{x}}\nA: ",
        target=" {gold[text][0]:upper}\n",
        batch_size=1,
    )
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert batch.prompts == ("T\nQ: Who? {x}\nA:",)
    assert batch.targets == (" ANN\n",)
    assert dict(batch.columns) == {name: (value,) for name, value in row.items()} | {"target": (" ANN\n",)}


@pytest.mark.parametrize(
    ("values", "names", "answers"),
    [
        ([1, 0], None, (1, 0)),
        ([True, False], None, (1, 0)),
        (["great", " terrible "], None, (1, 0)),
        (["positive", "negative"], ["negative", "positive"], (1, 0)),
        ([5, -5], ["-5", "5"], (1, 0)),
        ([True, False], ["True", "False"], (0, 1)),
    ],
)
def test_labels(tmp_path: Path, values: list[Any], names: list[str] | None, answers: tuple[int, ...]) -> None:
    path = write(tmp_path / "a.jsonl", [{"s": "it", "label": value} for value in values])
    data = PromptDataModule(
        path, "{s} was", options=[" terrible", " great"], label="label", label_names=names, batch_size=2
    )
    data.setup("fit")
    assert data.splits["train"].answers == answers
    assert data.splits["train"].columns["target"] == tuple((" terrible", " great")[answer] for answer in answers)


def test_options_of_each_row_may_be_columns(tmp_path: Path) -> None:
    rows = [{"p": "so", "c1": "1", "c2": "2", "label": "2"}, {"p": "as", "c1": "x", "c2": "1", "label": 1}]
    data = PromptDataModule(
        write(tmp_path / "a.jsonl", rows), "{p}", options=[" {c1}", " {c2}"], label="label", batch_size=2
    )
    data.setup("fit")
    assert data.splits["train"].options == ((" 1", " 2"), (" x", " 1"))
    assert data.splits["train"].answers == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "{query}"}, r"prompt names the column 'query', .* columns are n, question, answers, label"),
        ({"target": "{gold[0]}"}, "target names the column 'gold'"),
        ({"options": ["{x}", "b"]}, r"options\[0\] names the column 'x'"),
        ({"prompt": "{}"}, "prompt names the column ''"),
        ({"prompt": "{question"}, "prompt='{question': .*braces"),
        (
            {"prompt": "{answers[7]}"},
            r"rows.jsonl: prompt='{answers\[7\]}' does not fit row 0: list index out of range",
        ),
        ({"prompt": "{n[x]}"}, r"does not fit row 0: 'int' object is not subscriptable"),
        ({"prompt": "{n:nonsense}"}, "does not fit row 0: Invalid format specifier"),
        ({"options": [" x", " y"], "label": "gold"}, "label='gold' is no column of the data"),
        (
            {"options": [" x", " y"], "label": "n"},
            r"label='n' is 2 in row 2; it should be the right option's number, 0 to 1",
        ),
        ({"options": [" x", " y"], "label": "question"}, r"label='question' is 'q0 ' in row 0"),
        (
            {"options": [" x", " y"], "label": "label", "label_names": ["1", "2"]},
            "is 0 in row 0, which label_names does",
        ),
        ({"options": [" x", " y"], "label": "label", "label_names": ["1"]}, "names each of the options once"),
        ({"options": [" x"]}, "a choice needs two or more"),
        ({"label": "label"}, "there are no options"),
        ({"batch_size": 21}, "batch_size=21 is more than the 20 rows to train on"),
        ({"batch_size": 0}, "batch_size=0: at least one row"),
        ({"num_train": 0}, "num_train=0: ask for at least one"),
        ({"num_train": 21}, "num_train=21 is more than .*rows.jsonl can give: it has 20 rows"),
        ({"num_train": 16, "num_validation": 5}, r"num_train=16 \+ num_validation=5 is more than .* it has 20 rows"),
        ({"num_validation": 20}, "and train would be left without any"),
        ({"validation": "SOURCE"}, "train and validation both take all rows of .*: set num_validation"),
    ],
)
def test_what_is_wrong_is_said_in_setup(source: str, arguments: dict[str, Any], message: str) -> None:
    arguments = {name: source if value == "SOURCE" else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        PromptDataModule(**{"train": source, "prompt": "{question}", **arguments}).setup("fit")


def test_a_missing_value_is_an_error_and_not_the_word_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"q": "x"}, {"other": 1}])
    with pytest.raises(ValueError, match=r"prompt='{q}' does not fit row 1: the value is missing"):
        PromptDataModule(path, "{q}", batch_size=1).setup("fit")


# --- order ------------------------------------------------------------------------------------------------------------


def epochs(loader: TrainLoader, number: int) -> list[tuple[int, ...]]:
    return [batch.index for _ in range(number) for batch in loader]


def test_an_epoch_is_every_row_once_but_for_the_rest_of_a_batch() -> None:
    loader = TrainLoader(batch_of(11), 3, seed=5)
    assert len(loader) == 3
    first, second = epochs(loader, 1), epochs(loader, 1)
    assert len({row for batch in first for row in batch}) == 9
    assert first != second
    assert epochs(TrainLoader(batch_of(11), 3, seed=5), 2) == first + second
    assert epochs(TrainLoader(batch_of(11), 3, seed=6), 1) != first


@given(st.integers(0, 24))
def test_a_run_goes_on_from_any_batch(stop: int) -> None:
    whole = epochs(TrainLoader(batch_of(11), 3, seed=5), 9)
    loader = TrainLoader(batch_of(11), 3, seed=5)
    loader.load_state_dict({"batches": stop})
    rest = [batch.index for batch in loader]
    assert rest == whole[stop : stop + 3]
    assert loader.state_dict() == {"batches": stop + 3}


def test_what_is_finished_is_what_the_run_says() -> None:
    finished = 0
    loader = TrainLoader(batch_of(4), 2, seed=0, finished=lambda: finished)
    next(iter(loader))
    assert loader.state_dict() == {"batches": 0}
    finished = 1
    assert loader.state_dict() == {"batches": 1}


# --- real data --------------------------------------------------------------------------------------------------------

real = pytest.mark.skipif(not REAL.is_dir(), reason=f"{REAL} is absent")


@real
def test_xquad_in_mezos_prompt() -> None:
    data = PromptDataModule(
        str(REAL / "squad/xquad.en.json"),
        "Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:",
        target=" {answers[0]}\n",
        num_train=100,
        num_validation=50,
    )
    data.setup("fit")
    assert (len(data.splits["train"]), len(data.splits["validation"])) == (100, 50)
    row = data.splits["train"].select([0])
    assert row.prompts[0].startswith("Title: ")
    assert row.prompts[0].endswith("\nAnswer:")
    assert row.targets == (f" {row.columns['answers'][0][0]}\n",)
    assert row.columns["answers"][0][0] in row.columns["context"][0]


@real
def test_sst2_as_a_choice() -> None:
    data = PromptDataModule(
        str(REAL / "sst2/train.tsv"),
        "{sentence:strip} It was",
        validation=str(REAL / "sst2/dev.tsv"),
        options=[" terrible", " great"],
        label="label",
        num_train=1000,
    )
    data.setup("fit")
    assert len(data.splits["validation"]) == 872
    assert data.splits["validation"].prompts[0] == "it 's a charming and often affecting journey . It was"
    assert data.splits["validation"].columns["target"][:2] == (" great", " terrible")


@real
def test_copa_options_come_from_columns() -> None:
    data = PromptDataModule(
        str(REAL / "superglue/COPA/train.jsonl"), "{premise}", options=[" {choice1}", " {choice2}"], label="label"
    )
    data.setup("fit")
    first = data.splits["train"].select([0])
    assert first.options == ((" The sun was rising.", " The grass was cut."),)
    assert first.answers == (0,)
