"""The data module: any rows of text, a prompt template, and fixed splits; batches of text, not of tokens.

Splits follow MeZO (Malladi et al. 2023, arXiv 2305.17333, appendix E): a permutation of the training rows by a seed,
the first `num_train` to train on, the next to validate with. Prompts lose the spaces at their ends, as MeZO's do.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn

from mezo_lightning.data.batch import Batch as Batch
from mezo_lightning.data.loaders import FixedLoader, TrainLoader, permutation
from mezo_lightning.data.rendering import Renderer
from mezo_lightning.data.rows import EMBEDDED, HUB, Row, read_rows, with_split

_SPLITS = ("train", "validation", "test")
_NEEDED = {"fit": ("train", "validation"), "validate": ("validation",), "test": ("test",), "predict": ("predict",)}
_TEST_ROWS = "data.test to a source, or data.num_test to draw them of data.train"
_NO_ROWS = {
    "test": f"There are no rows to test: set {_TEST_ROWS}",
    "predict": f"There are no rows to predict: set data.predict to a source; targets are not needed. Or {_TEST_ROWS}",
}


class PromptDataModule(LightningDataModule):
    r"""Prompts (with targets, options, or columns for a reward) from a file, from this package or from the Hub.

    A template is text with the names of columns in braces, such as "Question: {question}\nAnswer:". It may index
    ({answers[0]}) and may clean a value ({sentence:strip}; also lower, upper, capitalize).

    Args:
        train: Where the training rows come from: a JSON, JSONL, CSV, TSV or Parquet file (SQuAD-format JSON has the
            columns title, context, question, answers and id), embedded/..., a file of this package, or a Hub data set
            as hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG@SPLIT.
        prompt: Template of the text that the model continues; spaces at its ends are stripped.
        validation: Where the validation rows come from; None draws num_validation of the training source's rows, never
            ones that are trained on.
        test: Where the test rows come from; None draws num_test of the training source's rows, never ones that are
            trained on or validated with.
        predict: Where the rows to predict come from, with no need for targets or labels; None takes the test rows.
        target: Template of the text that should follow the prompt, for cross-entropy, with its leading space.
        options: Templates of the texts to choose from, with their leading spaces.
        label: Column that says which option is right: its number from 0, its text, or one of label_names.
        label_names: What the label column calls the options, in their order.
        num_train: How many rows to train on; None takes all that the other splits leave.
        num_validation: How many rows to validate with; None takes all, or no rows where validation is None.
        num_test: How many rows to test with; None takes all, or no rows where test is None.
        batch_size: Rows of a training step, over all processes.
        validation_batch_size: Rows of a batch in validation, test and prediction; None is batch_size.
        seed: Decides which rows are drawn for the splits, and the order of training.
    """

    def __init__(
        self,
        train: str,
        prompt: str,
        validation: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        target: str | None = None,
        options: list[str] | None = None,
        label: str | None = None,
        label_names: list[str] | None = None,
        num_train: int | None = None,
        num_validation: int | None = None,
        num_test: int | None = None,
        batch_size: int = 16,
        validation_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.sources = {
            "train": with_split(train, "train"),
            "validation": with_split(validation or train, "validation" if validation else "train"),
            "test": with_split(test or train, "test" if test else "train"),
        }
        if predict is not None:
            self.sources["predict"] = with_split(predict, "test")
        self.numbers = {"train": num_train, "validation": num_validation, "test": num_test}
        # Drawn from the training source without a number: there is no such split.
        self.absent = {
            name
            for name, source in (("validation", validation), ("test", test))
            if source is None and self.numbers[name] is None
        }
        self.renderer = Renderer(prompt, target, options, label, label_names)
        self.batch_size = batch_size
        self.validation_batch_size = batch_size if validation_batch_size is None else validation_batch_size
        self.seed = seed
        self.splits: dict[str, Batch] = {}
        """The rows of each split that has been set up, each as one large Batch."""
        for name, value in {"batch_size": batch_size, "validation_batch_size": self.validation_batch_size}.items():
            if value < 1:
                raise ValueError(f"{name}={value}: at least one row is needed.")
        for name, number in self.numbers.items():
            if number is not None and number < 1:
                raise ValueError(f"num_{name}={number}: ask for at least one row, or leave it out.")

    def setup(self, stage: str | None = None) -> None:
        """Reads, draws and renders what the stage needs; whatever is wrong with the data is said here."""
        stage = TrainerFn(stage).value if stage else None  # Lightning gives the enum
        needed = _NEEDED[stage] if stage else _SPLITS
        if stage == "predict" and "predict" not in self.sources:
            needed = ("test",)
        read: dict[str, list[Row]] = {}
        for split in needed:
            if split not in self.splits and split not in self.absent:
                source = self.sources[split]
                if source not in read:
                    read[source] = read_rows(source)
                self.splits[split] = self._cut(split, read[source])
        if "train" in self.splits and len(self.splits["train"]) < self.batch_size:
            number = len(self.splits["train"])
            raise ValueError(f"batch_size={self.batch_size} is more than the {number} rows to train on.")
        if stage in ("test", "predict") and not self.splits.keys() & {"test", stage}:
            raise ValueError(_NO_ROWS[stage])

    def train_dataloader(self) -> TrainLoader:
        """Shuffled batches that go on after a resume where they stopped."""
        if self.trainer is None:
            return TrainLoader(self.splits["train"], self.batch_size, self.seed)
        trainer: Any = self.trainer  # Lightning sets the following from outside of its Trainer class
        if trainer.overfit_batches:
            raise ValueError("overfit_batches would not stop the shuffling: set num_train to a small number instead.")
        if trainer.reload_dataloaders_every_n_epochs:
            raise ValueError("reload_dataloaders_every_n_epochs would begin the order again: leave it at 0.")
        # A step and a batch are one.
        return TrainLoader(self.splits["train"], self.batch_size, self.seed, finished=lambda: trainer.global_step)

    def val_dataloader(self) -> FixedLoader | list[FixedLoader]:
        """The validation rows in fixed order; no loader where there are none."""
        return [] if "validation" in self.absent else self._fixed_loader("validation")

    def test_dataloader(self) -> FixedLoader:
        """The test rows in fixed order."""
        return self._fixed_loader("test")

    def predict_dataloader(self) -> FixedLoader:
        """The rows to predict in fixed order."""
        return self._fixed_loader("predict" if "predict" in self.sources else "test")

    def _fixed_loader(self, split: str) -> FixedLoader:
        return FixedLoader(self.splits[split], self.validation_batch_size)

    def _cut(self, split: str, rows: list[Row]) -> Batch:
        source = self.sources[split]
        if split == "predict":
            return self.renderer.render(rows, source, labelled=False)
        # Splits of one source are drawn together, so that they never share a row.
        numbers = {
            name: number
            for name, number in self.numbers.items()
            if name not in self.absent and _same_source(self.sources[name], source)
        }
        drawn = draw(len(rows), numbers, self.seed, source)
        return self.renderer.render([rows[place] for place in drawn[split]], source)


def _same_source(one: str, other: str) -> bool:
    if one == other or one.startswith((EMBEDDED, HUB)) or other.startswith((EMBEDDED, HUB)):
        return one == other
    return Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def draw(total: int, numbers: Mapping[str, int | None], seed: int, source: str) -> dict[str, list[int]]:
    """Disjoint sets of row numbers out of range(total), each in ascending order, the same for the same arguments.

    Args:
        total: How many rows the source has.
        numbers: How many rows each split wants; None, for one split at most, takes what the others leave.
        seed: Keys the draw.
        source: What error messages call the source.
    """
    asked = sum(number for number in numbers.values() if number is not None)
    greedy = [name for name, number in numbers.items() if number is None]
    wanted = " + ".join(f"num_{name}={number}" for name, number in numbers.items() if number is not None)
    if len(greedy) > 1:
        raise ValueError(f"{' and '.join(greedy)} both take all rows of {source}: set num_{greedy[-1]}.")
    if asked + len(greedy) > total:
        left = f", and {greedy[0]} would be left without any" if greedy else ""
        raise ValueError(f"{wanted} is more than {source} can give: it has {total} rows{left}.")
    order = permutation(total, seed, "draw")
    drawn: dict[str, list[int]] = {}
    first = 0
    for name, number in numbers.items():
        last = first + (total - asked if number is None else number)
        drawn[name] = sorted(order[first:last])
        first = last
    return drawn
