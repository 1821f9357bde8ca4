"""Makes the shipped sample of WordNet 3.0: the definitions of the words that English uses most.

From a folder with the files of Debian's `wordnet-base` (`apt-get download wordnet-base && dpkg-deb -x *.deb x`):

    python benchmarks/make_wordnet_sample.py x/usr/share/wordnet

A word's rank is the number of times that it is tagged, as one part of speech, in WordNet's concordance (`cntlist.rev`);
the gloss is that of its first sense, without the example sentences. Ties are broken by the alphabet, so two runs write
the same bytes. Only single words in lower case are taken, and only short glosses, so that a row fits in 64 GPT-2
tokens.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path

TARGET = Path(__file__).parents[1] / "jaxrl_llm" / "data" / "wordnet"
FILES = ("noun", "verb", "adj", "adv")
CONCORDANCE_POS = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}
MAX_GLOSS_CHARACTERS = 160


def words_by_use(folder: Path) -> list[tuple[str, str]]:
    """Every plain word of the concordance with a part of speech, most used first."""
    counts: Counter[tuple[str, str]] = Counter()
    for line in (folder / "cntlist.rev").read_text("ascii").splitlines():
        key, _, count = line.split()
        word, sense = key.split("%")
        if re.fullmatch(r"[a-z]{2,}", word):
            counts[word, CONCORDANCE_POS[sense[0]]] += int(count)
    return sorted(counts, key=lambda entry: (-counts[entry], entry))


def first_synsets(folder: Path, pos: str) -> dict[str, str]:
    """For each lemma of `index.<pos>` the offset of its first synset."""
    entries = (line.split() for line in (folder / f"index.{pos}").read_text("ascii").splitlines() if line[0] != " ")
    return {fields[0]: fields[-int(fields[2])] for fields in entries}


def glosses(folder: Path, pos: str) -> dict[str, str]:
    """For each synset offset of `data.<pos>` its definition, without the quoted examples."""
    lines = (folder / f"data.{pos}").read_text("ascii").splitlines()
    pairs = (line.split("|", 1) for line in lines if "|" in line and not line.startswith("  "))
    return {head.split()[0]: re.split(r';\s*(?=")', gloss.strip())[0].strip(" ;") for head, gloss in pairs}


def license_text(folder: Path) -> str:
    """The licence, as it stands in the numbered lines at the head of every data file."""
    head = [line for line in (folder / "data.noun").read_text("ascii").splitlines()[:40] if line.startswith("  ")]
    return "\n".join(re.sub(r"^ +\d+ ?", "", line).rstrip() for line in head) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with WordNet's data.noun, index.noun, cntlist.rev, …")
    parser.add_argument("--words", type=int, default=5000)
    arguments = parser.parse_args()
    definitions = {}
    for pos in FILES:
        gloss_at = glosses(arguments.folder, pos)
        definitions[pos] = {lemma: gloss_at[at] for lemma, at in first_synsets(arguments.folder, pos).items()}
    rows: dict[str, dict[str, str]] = {}
    for word, pos in words_by_use(arguments.folder):
        gloss = definitions[pos].get(word, "")
        if word not in rows and 0 < len(gloss) <= MAX_GLOSS_CHARACTERS and '"' not in gloss:
            rows[word] = {"word": word, "pos": pos, "gloss": gloss}
        if len(rows) == arguments.words:
            break
    lines = (json.dumps(rows[word], ensure_ascii=False) for word in sorted(rows))
    (TARGET / "definitions.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    (TARGET / "LICENSE").write_text(license_text(arguments.folder), "utf-8")


if __name__ == "__main__":
    main()
