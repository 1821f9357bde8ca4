"""Rows from text, JSON, JSONL and parquet files and from `datasets`, each with the place that it came from."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

SOURCES = (
    "a .json, .jsonl, .parquet or .txt file, a folder of .txt files or of `datasets`, or the name of a dataset on the "
    "hub"
)


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


def read_rows(
    source: str | Path, *, split: str = "train", config_name: str | None = None, encoding: str = "utf-8"
) -> list[Row]:
    """Reads all rows of a data source into memory; `open_rows` is for what does not fit there.

    Args:
        source: A file (.json: a list of objects, or one object that holds the list; .jsonl: an object a line;
            .parquet; .txt: one row, `{"text": the whole file}`), a folder of .txt files, a folder of `datasets`, or
            the name of a dataset on the hub.
        split: The split of a dataset, or the key of the list in a .json object that holds several.
        config_name: The configuration of a dataset that has several.
        encoding: Of text files; in a .jsonl file the byte 10 must end a line, as it does not in UTF-16.

    Returns:
        The rows in their order, at least one. Lines (of JSONL) and rows are counted from 1.

    Raises:
        FileNotFoundError: If there is no such file, folder or dataset.
        ValueError: If the kind of file is unknown, a file is not in its encoding, the JSON is invalid, a row is no
            object, or there is no row.
    """
    path = existing_path(source)
    if path is None:
        rows = as_rows(load_dataset(str(source), split, config_name), f"{source}[{split}]")
    elif path.is_dir():
        rows = [text_row(file, encoding) for file in text_files(path)]
    elif path.suffix == ".jsonl":
        rows = list(jsonl_rows(path, encoding))
    elif path.suffix == ".json":
        rows = _read_json(path, split, encoding)
    elif path.suffix == ".parquet":
        rows = as_rows(read_parquet(path).read().to_pylist(), str(path))
    else:
        rows = [text_row(path, encoding)]
    if not rows:
        raise ValueError(f"{source} has no rows.")
    return rows


def existing_path(source: str | Path) -> Path | None:
    """The file or folder of text files that a source names; None if it is a matter of `datasets`.

    Raises:
        FileNotFoundError: If the name is that of a file, and there is none.
        ValueError: If the kind of file is unknown.
    """
    path = Path(source)
    if path.suffix in {".json", ".jsonl", ".parquet", ".txt"} and not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}. A data source is {SOURCES}.")
        return path
    if path.is_file():
        raise ValueError(f"{path} ends in {path.suffix!r}. A data source is {SOURCES}.")
    return path if path.is_dir() and text_files(path) else None


def text_files(folder: Path) -> list[Path]:
    """The .txt files of a folder by name; none if it holds data of another kind, beside which they are no data."""
    data = {".json", ".jsonl", ".parquet", ".arrow", ".csv"}
    files = sorted(folder.iterdir())
    return [] if any(file.suffix in data for file in files) else [file for file in files if file.suffix == ".txt"]


def text_row(path: Path, encoding: str) -> Row:
    """Reads a text file as one row."""
    return Row(str(path), {"text": decode(path.read_bytes(), encoding, path, first=True)})


def jsonl_rows(path: Path, encoding: str) -> Iterator[Row]:
    """Reads a JSONL file row by row; blank lines are passed over."""
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield jsonl_row(line, path, encoding, number, position)
            position += len(line)


def jsonl_row(line: bytes, path: Path, encoding: str, number: int, position: int) -> Row:
    """Reads the line of a JSONL file that begins at byte `position`."""
    where = f"{path}, line {number}"
    return Row(where, _object(_parse_json(decode(line, encoding, where, position, first=number == 1), where), where))


def decode(content: bytes, encoding: str, where: str | Path, position: int = 0, *, first: bool) -> str:
    """Decodes bytes that stand at `position` of a file; a byte-order mark is dropped where the file begins.

    Raises:
        ValueError: If they are not in this encoding; names the file, the byte and the cure.
    """
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise not_encoded(error, where, encoding, position) from error
    return text.removeprefix("\ufeff") if first else text


def not_encoded(error: UnicodeDecodeError, where: str | Path, encoding: str, position: int) -> ValueError:
    """Makes the error of bytes, from `position` of a file on, that are not in its encoding."""
    return ValueError(
        f"{where}: byte {position + error.start} of the file (0x{error.object[error.start]:02x}) is not {encoding}. "
        "Convert the file (`iconv -f LATIN1 -t UTF-8`), or read it with read_rows(…, encoding=…)."
    )


def read_parquet(path: Path) -> Any:
    """Opens a parquet file.

    Raises:
        ValueError: If it is none.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no valid parquet file: {error}") from error


def load_dataset(name: str, split: str, config_name: str | None) -> Any:
    """Loads a dataset, memory-mapped, from a folder or the hub."""
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


def _read_json(path: Path, split: str, encoding: str) -> list[Row]:
    content = _parse_json(decode(path.read_bytes(), encoding, path, first=True), str(path))
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
