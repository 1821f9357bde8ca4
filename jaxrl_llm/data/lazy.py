"""Data larger than memory: rows that are read, and tokenized, when they are asked for.

A row is found by its index, so the batch of a step stays a pure function of seed and step (`batch_indices`), and a
resumed run goes on exactly where it stopped, without reading again what it has seen:

    rows = LazyTokens(open_rows("train.jsonl"), lambda row: tokenize_sft(supervised_example(row), …))
    batch = collate_sft([rows[i] for i in batch_indices(len(rows), 8, seed=0, step=step)], …)

Nothing is dropped beforehand: a row too long to have a target left keeps its place in the epoch with a loss mask that
is all false (`count_rows_without_targets` counts them in a batch), and a bad row raises when its turn comes.
"""

import functools
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

from jaxrl_llm.data.rows import (
    Row,
    existing_path,
    jsonl_row,
    load_dataset,
    read_parquet,
    read_rows,
    text_files,
    text_row,
)

T = TypeVar("T")


def open_rows(
    source: str | Path, *, split: str = "train", config_name: str | None = None, encoding: str = "utf-8"
) -> Sequence[Row]:
    """Opens a data source for random access without reading its rows into memory.

    Of a .jsonl file, the places of the lines are noted in one pass (16 bytes a row). A .parquet file and a dataset are
    memory-mapped by `datasets`, which converts parquet once into its cache. Of a folder of .txt files, one file is read
    at a time. A .json file has to be parsed as a whole, so it is held in memory: convert a large one to JSONL.

    Args:
        source: As in `read_rows`.
        split: As in `read_rows`.
        config_name: As in `read_rows`.
        encoding: As in `read_rows`.

    Returns:
        The rows that `read_rows` would give, at least one. The file must not change while they are in use.

    Raises:
        FileNotFoundError: If there is no such file, folder or dataset.
        ValueError: If the source cannot be opened or is empty; from a row, when it is read, if that is invalid.
    """
    path = existing_path(source)
    if path is not None and path.suffix == ".json":
        return read_rows(path, split=split, encoding=encoding)
    if path is None:
        rows = _dataset_rows(load_dataset(str(source), split, config_name), f"{source}[{split}]")
    elif path.suffix == ".jsonl":
        rows = _jsonl_rows(path, encoding)
    elif path.suffix == ".parquet":
        rows = _dataset_rows(_map_parquet(path), str(path))
    else:
        files = text_files(path) if path.is_dir() else [path]
        rows = LazySequence(len(files), lambda index: text_row(files[index], encoding))
    if not len(rows):
        raise ValueError(f"{source} has no rows.")
    return rows


class LazySequence(Sequence[T]):
    """A sequence that computes the elements that it is asked for.

    Args:
        length: Number of elements.
        get: From an index in [0, length) to its element.
    """

    def __init__(self, length: int, get: Callable[[int], T]):
        self._length, self._get = length, get

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self._get(i) for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(f"index must be in [-{self._length}, {self._length}), got {index}.")
        return self._get(int(index) % self._length)


class LazyTokens(LazySequence[T]):
    """Rows that are tokenized when they are asked for; the last few are kept.

    Args:
        rows: As `open_rows` gives them.
        tokenize: From a row to its tokens, such as `tokenize_sft(supervised_example(row), …)`.
        cache_size: Tokenized rows that are kept in memory; 0 for none.

    Example:
        >>> from jaxrl_llm.data.rows import as_rows
        >>> rows = LazyTokens(as_rows([{"text": "ab"}, {"text": "c"}]), lambda row: list(row.fields["text"]))
        >>> len(rows), rows[-1], rows[:1]
        (2, ['c'], [['a', 'b']])
    """

    def __init__(self, rows: Sequence[Row], tokenize: Callable[[Row], T], *, cache_size: int = 1024):
        super().__init__(len(rows), functools.lru_cache(cache_size)(lambda index: tokenize(rows[index])))


def _jsonl_rows(path: Path, encoding: str) -> LazySequence[Row]:
    starts, numbers, position = array("Q"), array("Q"), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                starts.append(position)
                numbers.append(number)
            position += len(line)

    def get(index: int) -> Row:
        with path.open("rb") as file:
            file.seek(starts[index])
            return jsonl_row(file.readline(), path, encoding, numbers[index], starts[index])

    return LazySequence(len(starts), get)


def _dataset_rows(dataset: Any, name: str) -> LazySequence[Row]:
    return LazySequence(len(dataset), lambda index: Row(f"{name}, row {index + 1}", dict(dataset[index])))


def _map_parquet(path: Path) -> Any:
    import datasets

    read_parquet(path).close()
    return datasets.Dataset.from_parquet(str(path))
