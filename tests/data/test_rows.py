"""Reading rows: every kind of source gives the same rows, and what cannot be read says why."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from jaxrl_llm.data import as_rows, read_rows

ROWS = [{"text": "幸福"}, {"text": "a\u2028b", "n": 1}]


@pytest.fixture(autouse=True)
def quiet_datasets(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, text):
    path.write_text(text, "utf-8")
    return path


def jsonl(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


def test_json_jsonl_and_parquet_files_are_read(tmp_path):
    sources = [
        write(tmp_path / "list.json", json.dumps(ROWS)),
        write(tmp_path / "object.json", json.dumps({"version": 1, "rows": ROWS})),
        write(tmp_path / "splits.json", json.dumps({"test": [], "train": ROWS})),
        write(tmp_path / "lines.jsonl", jsonl(ROWS)),
    ]
    for source in sources:
        assert [row.fields for row in read_rows(source)] == ROWS
    pyarrow.parquet.write_table(pyarrow.table({"text": ["幸福", "a"], "n": [None, 1]}), tmp_path / "table.parquet")
    parquet_rows = [row.fields for row in read_rows(str(tmp_path / "table.parquet"))]
    assert parquet_rows == [{"text": "幸福", "n": None}, {"text": "a", "n": 1}]


def test_a_saved_dataset_and_a_folder_of_files_are_read(tmp_path):
    dataset = datasets.Dataset.from_list([{"text": "a"}])
    dataset.save_to_disk(str(tmp_path / "dataset"))
    datasets.DatasetDict({"test": dataset}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", jsonl([{"text": "a"}]))
    for name, split in (("dataset", "train"), ("splits", "test"), ("folder", "train")):
        (row,) = read_rows(tmp_path / name, split=split)
        assert row.fields == {"text": "a"}
        assert row.where == f"{tmp_path / name}[{split}], row 1"


def test_a_text_file_is_a_row_and_a_folder_of_them_one_each(tmp_path):
    write(tmp_path / "b.txt", "\ufeffTo be\r\nor not")
    write(tmp_path / "a.txt", "幸福\n")
    write(tmp_path / "README.md", "no data")
    one, other = f"{tmp_path / 'a.txt'}", f"{tmp_path / 'b.txt'}"
    assert read_rows(other) == [(other, {"text": "To be\r\nor not"})]
    assert read_rows(tmp_path) == [(one, {"text": "幸福\n"}), (other, {"text": "To be\r\nor not"})]
    write(tmp_path / "train.jsonl", jsonl(ROWS[:1]))
    assert [row.fields for row in read_rows(tmp_path)] == ROWS[:1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.txt",
            "Stra\xdfe",
            r"a.txt: byte 4 of the file \(0xdf\) is not utf-8. Convert the file .* or read it with read_rows",
        ),
        ("a.json", '[{"text": "Stra\xdfe"}]', r"a.json: byte 15 of the file \(0xdf\) is not utf-8"),
        (
            "a.jsonl",
            '{"text": "a"}\n\n{"text": "\xdf"}\n',
            r"a.jsonl, line 3: byte 25 of the file \(0xdf\) is not utf-8",
        ),
    ],
)
def test_a_file_in_another_encoding_is_an_error_with_place_and_cure(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        read_rows(path)
    assert "ß" in read_rows(path, encoding="latin-1")[-1].fields["text"]


def test_a_row_knows_its_line_and_blank_lines_count(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"text": "a"}\n\n{"text": "b"}\r\n')
    assert [row.where for row in read_rows(path)] == [f"{path}, line 1", f"{path}, line 3"]
    path = write(tmp_path / "a.json", json.dumps(ROWS))
    assert [row.where for row in read_rows(path)] == [f"{path}, row 1", f"{path}, row 2"]


def test_rows_in_memory_are_copied():
    fields = {"text": "a"}
    (row,) = as_rows([fields], "mine")
    fields["text"] = "b"
    assert row == ("mine, row 1", {"text": "a"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": }\n', r"a.jsonl, line 2: invalid JSON at column 10: Expecting value"),
        ("a.jsonl", "[1]\n", r"a.jsonl, line 1: a row must be a JSON object, got list"),
        ("a.jsonl", "\n", r"a.jsonl has no rows"),
        ("a.json", "[]", r"a.json has no rows"),
        ("a.json", '{"train": [], "test": [{"text": "a"}]}', r"a.json has no rows"),
        ("a.json", "", r"a.json: invalid JSON at line 1, column 1"),
        ("a.json", "[\n{},\n{]", r"a.json: invalid JSON at line 3, column 2"),
        ("a.json", "7", r"a.json holds a JSON int; expected a list"),
        ("a.json", '[{"text": "a"}, "b"]', r"a.json, row 2: a row must be a JSON object, got str"),
        ("a.json", '{"dev": [], "test": []}', r"2 lists \['dev', 'test'\], none of them called 'train'"),
        ("a.csv", "text\na", r"a.csv ends in '.csv'. A data source is a .json, .jsonl, .parquet or .txt file"),
        ("a.parquet", "text", r"a.parquet is no valid parquet file"),
    ],
)
def test_a_source_that_cannot_be_read_says_why(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read_rows(write(tmp_path / name, content))


def test_a_missing_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*missing.jsonl"):
        read_rows(tmp_path / "missing.jsonl")
    with pytest.raises(FileNotFoundError, match="There is no file, folder or dataset"):
        read_rows(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' cannot be loaded"):
        read_rows("nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="cannot be loaded"):
        read_rows(tmp_path / "empty")


def test_a_missing_split_is_named(tmp_path):
    datasets.DatasetDict({"test": datasets.Dataset.from_list([{"text": "a"}])}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match="gives no split 'train'"):
        read_rows(tmp_path / "splits")
