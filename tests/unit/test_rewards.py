"""The reward functions that come with the package, against known values and properties."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import choice, squad
from rewards.metrics import TorchMetric
from rewards.rouge import Rouge
from rewards.text import Matches

WORDS = st.lists(st.sampled_from(["the", "a", "red", "ball", "Ball!", "boy", "-", "ran"]), max_size=6).map(" ".join)


@pytest.mark.parametrize(
    ("completion", "golds", "f1", "exact"),
    [
        ("a red ball", ["a red ball"], 1.0, 1.0),
        ("The red  ball!", ["a red ball"], 1.0, 1.0),  # articles, punctuation, case, spaces
        ("Finn found a red ball.", ["a red ball"], 2 * 2 / (4 + 2), 0.0),
        ("red red", ["red ball"], 2 * 1 / (2 + 2), 0.0),  # a word counts as often as the gold has it
        ("blue", ["a red ball"], 0.0, 0.0),
        ("blue", ["red", "blue sky", "blue"], 1.0, 1.0),  # the best gold
        ("", ["red"], 0.0, 0.0),
        ("no answer here", ["no answer"], 0.0, 0.0),  # a refusal is exact or nothing
        ("No answer.", ["no answer"], 1.0, 1.0),
        ("CANNOTANSWER", ["CANNOTANSWER", "other"], 1.0, 1.0),
        ("", [], 1.0, 1.0),  # SQuAD 2: no gold wants an empty answer
        ("red", [], 0.0, 0.0),
        ("the", ["a"], 1.0, 1.0),  # nothing is left of either
    ],
)
def test_squad_known_values(completion: str, golds: list[str], f1: float, exact: float) -> None:
    assert squad.f1([completion], [golds]) == [pytest.approx(f1)]
    assert squad.exact_match([completion], [golds]) == [exact]
    assert squad.f1([completion], [{"text": golds, "answer_start": [0] * len(golds)}]) == [pytest.approx(f1)]


def test_squad_takes_a_plain_string_and_ignores_other_columns() -> None:
    assert squad.f1(prompts=["?"], completions=["red"], answers=["red"], title=["t"]) == [1.0]


def test_squad_refuses_columns_of_another_length() -> None:
    with pytest.raises(ValueError, match="zip"):
        squad.f1(["a", "b"], [["a"]])


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
def test_squad_f1_is_bounded_symmetric_and_above_exact_match(completion: str, golds: list[str]) -> None:
    value, exact = squad.f1([completion], [golds])[0], squad.exact_match([completion], [golds])[0]
    assert exact <= value <= 1.0
    assert value >= 0.0
    assert squad.f1([completion], [golds[:1]]) == pytest.approx(squad.f1([golds[0]], [[completion]]))


def test_rouge_known_values() -> None:
    # rouge1 by hand: 3 of 3 words of the completion are among the 6 of the reference.
    reference = ["the cat sat on the mat"]
    assert Rouge("rouge1", "ref", "precision")(["the cat sat"], ref=reference) == [1.0]
    assert Rouge("rouge1", "ref", "recall")(["the cat sat"], ref=reference) == [0.5]
    assert Rouge("rouge1", "ref")(["the cat sat"], ref=reference) == [pytest.approx(2 / 3)]
    assert Rouge("rougeL", "ref", "recall")(["mat the sat"], ref=reference) == [pytest.approx(2 / 6)]
    assert Rouge("rouge1", "ref")(["cats"], ref=["cat"]) == [1.0]
    assert Rouge("rouge1", "ref", stemmer=False)(["cats"], ref=["cat"]) == [0.0]


def test_rouge_takes_the_best_of_several_references_and_lines_as_sentences() -> None:
    assert Rouge("rouge1", "ref")(["cat", "dog"], ref=[["bird", "cat"], ["cat", "bird"]]) == [1.0, 0.0]
    assert Rouge("rougeLsum", "ref")(["one two\nthree"], ref=["three\none two"]) == [1.0]


def test_rouge_refuses_bad_settings_and_missing_columns() -> None:
    with pytest.raises(ValueError, match="kind='rougeX'"):
        Rouge("rougeX")
    with pytest.raises(ValueError, match="no such column; there are \\['text'\\]"):
        Rouge(references="summary")(["a"], text=["a"])
    with pytest.raises(ValueError, match="Rouge: column 'text' has a row without any reference"):
        Rouge(references="text")(["a", "b"], text=["a", []])


def test_rouge_refuses_the_old_package_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.4")
    with pytest.raises(ValueError, match=r"rouge-score 0\.1\.2, installed is 0\.0\.4"):
        Rouge()


def test_torchmetric_higher_is_always_better() -> None:
    chrf = TorchMetric("torchmetrics.text.CHRFScore", "ref", {"n_word_order": 0})
    same, near, far = chrf(["a red ball", "a red bell", "zzz"], ref=["a red ball"] * 3)
    assert same == pytest.approx(1.0)
    assert same > near > far
    errors = TorchMetric("torchmetrics.text.WordErrorRate", "ref")
    assert errors(["a red ball", "a red"], ref=["a red ball"] * 2) == [0.0, pytest.approx(-1 / 3)]


def test_torchmetric_each_row_is_scored_alone_with_its_best_reference() -> None:
    distance = TorchMetric("torchmetrics.text.EditDistance", "ref")
    assert distance(["cat", "dog"], ref=[["cart", "dog"], "dog"]) == [-1.0, 0.0]
    with pytest.raises(ValueError, match="without any reference"):
        distance(["cat"], ref=[[]])


def test_torchmetric_of_several_scores_needs_a_key() -> None:
    options = {"rouge_keys": ("rouge1",)}
    rouge = TorchMetric("torchmetrics.text.ROUGEScore", "ref", options, key="rouge1_recall")
    assert rouge(["the cat"], ref=["the cat sat down"]) == [0.5]
    with pytest.raises(ValueError, match=r"computes \['rouge1_fmeasure'"):
        TorchMetric("torchmetrics.text.ROUGEScore", "ref", options)(["a"], ref=["a"])


def test_torchmetric_takes_an_instance_and_refuses_what_is_no_metric() -> None:
    from torchmetrics.text import CharErrorRate

    assert TorchMetric(CharErrorRate(), "ref")(["abc"], ref=["abd"]) == [pytest.approx(-1 / 3)]
    with pytest.raises(ValueError, match="no such class"):
        TorchMetric("torchmetrics.text.Nonsense", "ref")
    with pytest.raises(TypeError, match="is no torchmetrics"):
        TorchMetric("collections.OrderedDict", "ref")
    with pytest.raises(ValueError, match="no such column"):
        TorchMetric(CharErrorRate(), "ref")(["abc"], gold=["abd"])


def test_choice_accuracy_ignores_spaces_at_the_ends() -> None:
    assert choice.accuracy(["great", "great", " great"], [" great", " terrible", "great "]) == [1.0, 0.0, 1.0]


def test_matches() -> None:
    assert Matches(r"\d+")(["12 ", "12a", ""], prompts=["", "", ""]) == [1.0, 0.0, 0.0]
    assert Matches(r"\d+", whole=False)(["a 12 b", "ab"]) == [1.0, 0.0]
    assert Matches("<think>.*</think>.+")(["<think>a\nb</think> c"]) == [1.0]
    assert Matches("yes", ignore_case=True)(["YES"]) == [1.0]
    with pytest.raises(ValueError, match="is no regular expression"):
        Matches("(")


def test_importing_rewards_loads_neither_torch_nor_the_trainer() -> None:
    code = (
        "import sys, rewards.squad, rewards.rouge, rewards.metrics, rewards.choice, rewards.text;"
        "print([m for m in ('torch', 'rouge_score', 'mezo_lightning', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
