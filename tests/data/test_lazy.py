"""Lazy rows: the same as those read at once, found by index, and not held in memory."""

import json
import tracemalloc

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from jaxrl_llm.data import (
    LazyTokens,
    batch_indices,
    collate_sft,
    count_rows_without_targets,
    open_rows,
    read_rows,
    rows,
    supervised_example,
    tokenize_sft,
)
from tests.unchecked import unchecked


@pytest.fixture(autouse=True)
def quiet_datasets(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def untouched():
    """The checks of types look into sequences; without them nothing is read but by the test itself."""
    with unchecked():
        yield


def sources(folder):
    """The same data in every kind of source."""
    fields = [{"text": "幸福"}, {"text": "a\u2028b"}, {"text": "c"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in fields]
    (folder / "a.jsonl").write_text("\ufeff" + "\n\n".join(lines), "utf-8", newline="\r\n")
    (folder / "a.json").write_text(json.dumps(fields))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(fields), folder / "a.parquet")
    datasets.Dataset.from_list(fields).save_to_disk(str(folder / "dataset"))
    (folder / "texts").mkdir()
    for number, row in enumerate(fields):
        (folder / "texts" / f"{number}.txt").write_text(row["text"], "utf-8")
    return [folder / name for name in ("a.jsonl", "a.json", "a.parquet", "dataset", "texts", "texts/1.txt")]


def test_lazy_rows_are_those_read_at_once(tmp_path):
    for source in sources(tmp_path):
        lazy, whole = open_rows(source), read_rows(source)
        assert list(lazy) == whole
        assert len(lazy) == len(whole)
        assert [lazy[index] for index in reversed(range(len(whole)))] == whole[::-1]
        assert (lazy[-1], lazy[np.int64(0)], lazy[1:]) == (whole[-1], whole[0], whole[1:])
        with pytest.raises(IndexError):
            lazy[len(whole)]


def test_rows_are_read_when_they_are_asked_for_and_not_kept(tmp_path, monkeypatch, untouched):
    path = tmp_path / "large.jsonl"
    with path.open("w") as file:
        for number in range(2000):
            file.write(json.dumps({"text": f"{number} " + 10_000 * "x"}) + "\n")
    parsed, parse = [], rows._parse_json
    monkeypatch.setattr(rows, "_parse_json", lambda text, where: parsed.append(where) or parse(text, where))
    tracemalloc.start()
    lazy = open_rows(path)
    assert (len(lazy), parsed) == (2000, [])
    tokens = LazyTokens(lazy, lambda row: row.fields["text"].split()[0], cache_size=3)
    assert [tokens[index] for index in (1999, 0, 1000, 0)] == ["1999", "0", "1000", "0"]
    assert parsed == [f"{path}, line {number}" for number in (2000, 1, 1001)]
    assert list(tokens) == [str(number) for number in range(2000)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 20_000_000 > 10 * peak


def test_the_last_tokens_are_kept_and_the_oldest_forgotten(untouched):
    asked = []
    tokens = LazyTokens(rows.as_rows([{}] * 5), lambda row: asked.append(row.where) or len(asked), cache_size=2)
    assert [tokens[index] for index in (0, 1, 0, 1, -5)] == [1, 2, 1, 2, 1]
    assert [tokens[index] for index in (2, 3, 0)] == [3, 4, 5]


def test_a_run_on_lazy_rows_resumes_with_the_same_batches(tmp_path, digits):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}+1=", "completion": f"{n + 1}"}) + "\n" for n in range(50)))

    def batches(steps):
        def tokenize(row):
            return tokenize_sft(supervised_example(row), digits, max_length=8)

        tokens = LazyTokens(open_rows(path), tokenize)
        for step in steps:
            picked = [tokens[index] for index in batch_indices(len(tokens), 8, seed=5, step=step)]
            yield collate_sft(picked, pad_id=0, length=8)

    whole, resumed = list(batches(range(20))), list(batches(range(13, 20)))
    for one, other in zip(whole[13:], resumed, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(one, other, strict=True))


def test_a_row_with_nothing_to_learn_keeps_its_place_and_can_be_counted(tmp_path, digits):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "1+1=", "completion": "2"}\n{"prompt": "1+1+1+1=", "completion": "4"}\n')
    tokens = LazyTokens(open_rows(path), lambda row: tokenize_sft(supervised_example(row), digits, max_length=6))
    batch = collate_sft(tokens[:], pad_id=0, length=6)
    assert batch.loss_mask.any(axis=1).tolist() == [True, False]
    assert count_rows_without_targets(batch.loss_mask) == 1


def test_a_bad_row_is_named_when_its_turn_comes(tmp_path, untouched):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": \n{"text": "\xff"}\n')
    lazy = open_rows(path)
    assert lazy[0].fields == {"text": "a"}
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: invalid JSON at column"):
        lazy[1]
    with pytest.raises(ValueError, match=r"a.jsonl, line 3: byte 34 of the file \(0xff\) is not utf-8"):
        lazy[2]


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("a.jsonl", "\n \n", ValueError, "a.jsonl has no rows"),
        ("a.json", "[]", ValueError, "a.json has no rows"),
        ("a.parquet", "text", ValueError, "a.parquet is no valid parquet file"),
        ("a.csv", "a", ValueError, "a.csv ends in '.csv'"),
        ("b.txt", None, FileNotFoundError, "There is no file .*b.txt"),
    ],
)
def test_a_source_that_cannot_be_opened_says_why(tmp_path, name, content, error, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(error, match=message):
        open_rows(tmp_path / name)
