"""Rows from JSON, JSONL and parquet files and from `datasets`, each with the place that it came from."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

SOURCES = "a .json, .jsonl or .parquet file, a folder of `datasets`, or the name of a dataset on the hub"


class Row(NamedTuple):
    """One row of a data source."""

    where: str
    """The place, for error messages: "train.jsonl, line 3"."""
    fields: dict[str, Any]
    """The columns by name."""


def as_rows(dicts: Iterable[Mapping[str, Any]], name: str = "rows") -> list[Row]:
    """Wraps rows that are already in memory.

    Example:
        >>> as_rows([{"prompt": "3+4+5="}], "sums")
        [Row(where='sums, row 1', fields={'prompt': '3+4+5='})]
    """
    return [Row(f"{name}, row {number}", dict(fields)) for number, fields in enumerate(dicts, start=1)]


def read_rows(source: str | Path, *, split: str = "train", config_name: str | None = None) -> list[Row]:
    """Reads all rows of a data source into memory.

    Args:
        source: A file (.json: a list of objects, or one object that holds the list; .jsonl: an object a line;
            .parquet), a folder of `datasets`, or the name of a dataset on the hub.
        split: The split of a dataset, or the key of the list in a .json object that holds several.
        config_name: The configuration of a dataset that has several.

    Returns:
        The rows in their order, at least one. Lines (of JSONL) and rows are counted from 1.

    Raises:
        FileNotFoundError: If there is no such file, folder or dataset.
        ValueError: If the kind of file is unknown, the JSON is invalid, a row is no object, or there is no row.
    """
    path = Path(source)
    if path.suffix in _READERS:
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}. A data source is {SOURCES}.")
        rows = _READERS[path.suffix](path, split)
    elif path.is_file():
        raise ValueError(f"{path} ends in {path.suffix!r}. A data source is {SOURCES}.")
    else:
        rows = as_rows(_load_dataset(str(source), split, config_name), f"{source}[{split}]")
    if not rows:
        raise ValueError(f"{source} has no rows.")
    return rows


def _read_jsonl(path: Path, split: str) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), start=1):
        where = f"{path}, line {number}"
        if line.strip():
            rows.append(Row(where, _object(_parse_json(line, where), where)))
    return rows


def _read_json(path: Path, split: str) -> list[Row]:
    content = _parse_json(path.read_text("utf-8-sig"), str(path))
    if isinstance(content, dict):
        lists = {key: value for key, value in content.items() if isinstance(value, list)}
        if split not in lists and len(lists) != 1:
            raise ValueError(
                f"{path} holds an object with {len(lists)} lists {sorted(lists)}, none of them called {split!r}. "
                "Give the name of the list as `split`, or write the rows as one JSON list."
            )
        content = lists[split] if split in lists else next(iter(lists.values()))
    if not isinstance(content, list):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}; expected a list of objects.")
    places = [f"{path}, row {number}" for number in range(1, len(content) + 1)]
    return [Row(where, _object(fields, where)) for where, fields in zip(places, content, strict=True)]


def _read_parquet(path: Path, split: str) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return as_rows(pyarrow.parquet.read_table(path).to_pylist(), str(path))
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no valid parquet file: {error}") from error


_READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _load_dataset(name: str, split: str, config_name: str | None) -> Any:
    import datasets
    import datasets.exceptions

    saved = Path(name, "state.json").is_file() or Path(name, "dataset_dict.json").is_file()
    if not Path(name).is_dir() and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise FileNotFoundError(f"There is no file, folder or dataset {name!r}. A data source is {SOURCES}.")
    try:
        loaded: Any = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, config_name, split=split)
        return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
    except (KeyError, ValueError) as error:
        raise ValueError(f"The dataset {name!r} gives no split {split!r}: {error}") from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise FileNotFoundError(f"{name!r} cannot be loaded ({error}). A data source is {SOURCES}.") from error


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        position = f"column {error.colno}" if ", line " in where else f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where}: invalid JSON at {position}: {error.msg}.") from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a row must be a JSON object, got {type(value).__name__} {str(value)[:40]!r}.")
    return value
