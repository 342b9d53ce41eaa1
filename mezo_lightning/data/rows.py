"""Rows, as dictionaries, out of a file, out of this package or from the Hugging Face Hub.

Local files are read by the standard library and pyarrow rather than through `datasets`: no copy is left in a cache, and
values stay what the file says (no common schema that fills nested fields with None, no "NA" that becomes NaN).
"""

import csv
import importlib.resources
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

Row = dict[str, Any]

EMBEDDED = "embedded/"
HUB = "hub:"


def read_rows(source: str) -> list[Row]:
    """Reads all rows of a source; every row has the same columns, with None where its own line had no value.

    Args:
        source: A JSON, JSONL, CSV, TSV or Parquet file; SQuAD-format JSON, which is flattened to the columns title,
            context, question, answers and id; `embedded/...`, a file that comes with this package; or
            `hub:NAME@SPLIT` or `hub:NAME:CONFIG@SPLIT`, a data set on the Hugging Face Hub.
    """
    if source.startswith(HUB):
        rows = _read_hub(source)
    elif source.startswith(EMBEDDED):
        with importlib.resources.as_file(importlib.resources.files("mezo_lightning") / "assets") as assets:
            rows = _read_file(assets / source.removeprefix(EMBEDDED), source)
    else:
        rows = _read_file(Path(source).expanduser(), source)
    if not rows:
        raise ValueError(f"{source}: there are no rows in it.")
    return _same_columns(rows)


def with_split(source: str, split: str) -> str:
    """The source, with this split where it is on the Hub and names none."""
    return f"{source}@{split}" if source.startswith(HUB) and "@" not in source else source


def _read_hub(source: str) -> list[Row]:
    import datasets

    path, _, split = source.removeprefix(HUB).partition("@")
    name, _, config = path.partition(":")
    if not name or not split:
        raise ValueError(f"{source!r} names no data set and split: write hub:NAME@SPLIT or hub:NAME:CONFIG@SPLIT.")
    try:
        return datasets.load_dataset(name, config or None, split=split).to_list()
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{source}: {error} Where the Hub is out of reach, name a local file.") from error


def _read_file(path: Path, source: str) -> list[Row]:
    if not path.is_file():
        raise FileNotFoundError(f"Data file {source!r} does not exist (looked at {path.absolute()}).")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{source}: cannot read {path.suffix or 'a file without suffix'}; use {', '.join(_READERS)}.")
    return reader(path)


def _read_json(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _read_json_lines(path)
        raise ValueError(f"{path}: line {error.lineno} is no JSON: {error.msg}.") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
        if any("paragraphs" in article for article in content):
            return list(_squad_rows(content))
    # One object may be the whole of a file of JSON lines that holds a single row.
    return _objects(path, enumerate([content] if isinstance(content, dict) else content, start=1))


def _read_json_lines(path: Path) -> list[Row]:
    def values() -> Iterable[tuple[int, Any]]:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ValueError(f"{path}: line {number} is no JSON: {error.msg}.") from error

    return _objects(path, values())


def _objects(path: Path, values: Iterable[tuple[int, Any]]) -> list[Row]:
    rows: list[Row] = []
    for number, value in values:
        if not isinstance(value, dict):
            raise ValueError(f"{path}: row {number} is {str(value)[:40]!r}, and should be an object of columns.")
        rows.append(value)
    return rows


def _squad_rows(articles: Iterable[Row]) -> Iterable[Row]:
    for article in articles:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                yield {
                    "title": article.get("title", ""),
                    "context": paragraph["context"],
                    "question": question["question"],
                    "answers": [answer["text"] for answer in question["answers"]],
                    "id": question["id"],
                }


def _read_csv(path: Path) -> list[Row]:
    return _read_table(path, delimiter=",", quoting=csv.QUOTE_MINIMAL)


def _read_tsv(path: Path) -> list[Row]:
    # As GLUE's files and the text/tab-separated-values type have it: a quotation mark is an ordinary character.
    return _read_table(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_table(path: Path, delimiter: str, quoting: Literal[0, 3]) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{path}: the first line must name each column once; it is {header}.")
        lines: list[list[str]] = []
        try:
            for fields in reader:
                if fields and len(fields) != len(header):
                    raise csv.Error(f"there are {len(fields)} fields, and the header names {len(header)}")
                if fields:
                    lines.append(fields)
        except csv.Error as error:
            raise ValueError(f"{path}: line {reader.line_num}: {error}.") from error
    columns = [_as_numbers([line[place] for line in lines]) for place in range(len(header))]
    return [dict(zip(header, values, strict=True)) for values in zip(*columns, strict=True)]


def _as_numbers(texts: list[str]) -> list[Any]:
    """The column as int or float where that loses nothing ("007" and "1.50" stay text), else as it is."""
    for number in (int, float):
        try:
            numbers = [number(text) for text in texts]
        except ValueError:
            continue
        if all(str(value) == text for value, text in zip(numbers, texts, strict=True)):
            return numbers
    return texts


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from error


def _same_columns(rows: list[Row]) -> list[Row]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [{name: row.get(name) for name in names} for row in rows]


_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
