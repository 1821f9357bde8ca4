"""The film review snippets that came with VADER: read, cleaned, split, and made into the rows that recipes read.

Twenty or so people rated each snippet from -4 (extremely negative) to 4 (extremely positive); its score is their mean.
Snippets are split before anything is made of them, by a hash of their words, so that no snippet stands on both sides,
not even with other spacing, case or punctuation. Which review a snippet comes from is not known, so two of one film may
be parted.
"""

import hashlib
import html
import io
import re
import tarfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

PROMPT = "<|endoftext|>"
"""Two snippets share no prompt, so all are continuations of the token that begins a text."""
EVAL_ONE_IN = 5
MIN_MARGIN = 1.5
"""Pairs differ by at least this much in mean rating (points of the scale from -4 to 4)."""
NEUTRAL = 0.5
"""Snippets rated between -NEUTRAL and NEUTRAL have no label."""
PAIRS = {"train": 8_000, "eval": 1_000}
MAX_USES = {"train": 2, "eval": 1}
"""How many pairs a snippet may stand in. Held-out pairs share none, so they are independent given the model."""
ROUNDS = 100
"""Rounds of drawing pairs; with fewer than enough pairs after them, there are no more."""

Row: TypeAlias = dict[str, Any]


class Snippet(NamedTuple):
    """A snippet and its mean rating in [-4, 4]."""

    text: str
    score: float


def read_snippets(sdist: Path) -> list[Snippet]:
    """Reads the snippets from the source distribution of vaderSentiment, cleaned.

    Raises:
        ValueError: A line is not `id TAB rating TAB text`, or a rating is not in [-4, 4].
    """
    with tarfile.open(sdist) as outer:
        inner = _member(outer, "hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        # UTF-8, whatever else the archive holds: read as Latin-1, "clichés" would be "clichÃ©s".
        lines = _member(archive, "movieReviewSnippets_GroundTruth.txt").decode("utf-8").splitlines()
    snippets = []
    for number, line in enumerate(lines, start=1):
        fields = line.split("\t")
        if len(fields) != 3 or not -4 <= float(fields[1]) <= 4:
            raise ValueError(
                f"line {number} of the snippets must be an id, a rating in [-4, 4] and a text, got {line!r}."
            )
        snippets.append(Snippet(clean(fields[2]), round(float(fields[1]), 6)))
    return snippets


def clean(text: str) -> str:
    """Undoes HTML entities and quotes written as two apostrophes, and makes all runs of white space one space.

    >>> clean(" S&amp;M is  ''romantic''")
    'S&M is "romantic"'
    """
    return " ".join(html.unescape(text).replace("''", '"').split())


def words_of(text: str) -> str:
    """The words of a text in lower case, without accents and punctuation: what makes two snippets the same.

    >>> words_of("A cliché,  A Mess!")
    'a cliche a mess'
    """
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii").lower()
    return " ".join(re.findall(r"[a-z0-9]+", plain))


def split(snippets: Sequence[Snippet]) -> dict[str, list[Snippet]]:
    """Splits snippets into "train" and "eval" by a hash of their words; of the same words the first is kept.

    The order is that of the hash, in which the ratings are mixed.
    """
    unique: dict[str, Snippet] = {}
    for snippet in snippets:
        unique.setdefault(words_of(snippet.text), snippet)
    sides: dict[str, list[Snippet]] = {"train": [], "eval": []}
    for words in sorted(unique, key=_digest):
        sides["eval" if _digest(words) % EVAL_ONE_IN == 0 else "train"].append(unique[words])
    return sides


def draw_pairs(snippets: Sequence[Snippet], *, count: int, max_uses: int) -> list[tuple[Snippet, Snippet]]:
    """Draws (better, worse) pairs of snippets whose ratings differ by `MIN_MARGIN` or more.

    In each round those that may still be used are put in a new order, and neighbours are paired where they differ
    enough. No pair comes twice.

    Args:
        snippets: The snippets of one split.
        count: The number of pairs.
        max_uses: The number of pairs that a snippet may stand in.

    Raises:
        ValueError: So many pairs cannot be drawn.
    """
    uses: Counter[str] = Counter()
    pairs: dict[tuple[Snippet, Snippet], None] = {}
    for number in range(ROUNDS):
        free = [snippet for snippet in snippets if uses[snippet.text] < max_uses]
        free.sort(key=lambda snippet: _digest(f"{number}\n{snippet.text}"))
        for pair in zip(free[::2], free[1::2], strict=False):
            worse, better = sorted(pair, key=lambda snippet: snippet.score)
            if better.score - worse.score >= MIN_MARGIN and (better, worse) not in pairs:
                pairs[better, worse] = None
                uses.update((better.text, worse.text))
                if len(pairs) == count:
                    return list(pairs)
    raise ValueError(f"count is {count}, but only {len(pairs)} pairs were found: lower it or raise max_uses.")


def tables(snippets: Sequence[Snippet]) -> dict[str, list[Row]]:
    """Makes the rows of every file, by its name without the ending.

    | file | a row |
    |---|---|
    | texts | `text`: for pretraining |
    | ratings | `text`, `score`: for pointwise reward models |
    | pairs | `prompt`, `chosen`, `rejected`, `margin` (difference of the ratings): for DPO, ORPO, CPO, reward models |
    | unpaired | `prompt`, `completion`, `label` (true for positive): for KTO |
    | positive | `text`: the positive ones, for SFT |
    """
    rows: dict[str, list[Row]] = defaultdict(list)
    for side, members in split(snippets).items():
        for text, score in members:
            rows[f"texts_{side}"].append({"text": text})
            rows[f"ratings_{side}"].append({"text": text, "score": score})
            if abs(score) > NEUTRAL:
                rows[f"unpaired_{side}"].append({"prompt": PROMPT, "completion": text, "label": score > 0})
            if score > NEUTRAL:
                rows[f"positive_{side}"].append({"text": text})
        for better, worse in draw_pairs(members, count=PAIRS[side], max_uses=MAX_USES[side]):
            margin = round(better.score - worse.score, 6)
            rows[f"pairs_{side}"].append(
                {"prompt": PROMPT, "chosen": better.text, "rejected": worse.text, "margin": margin}
            )
    return dict(rows)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    """The content of the one file of an archive that has this name, in whatever folder."""
    (member,) = (member for member in archive if Path(member.name).name == name)
    return archive.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")
