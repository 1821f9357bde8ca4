"""Texts larger than memory: read in blocks, tokenized in pieces, kept as a file of ids, and read a window at a time.

    tokens = write_tokens("runs/books/tokens", "books/", tokenizer)     # once; a file that fits is used again
    windows = tokens.windows(256)                                       # as `text_windows`, but read when asked for

The ids are those of the whole texts. A text is cut only where its tokens are seen to stay the same, before white space if
possible, and what is behind the cut is tokenized with what follows it.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxrl_llm.data import fields
from jaxrl_llm.data.lazy import LazySequence, open_rows
from jaxrl_llm.data.rows import Row, existing_path, not_encoded, text_files
from jaxrl_llm.data.tokenizers import Tokenizer, encode_text
from jaxrl_llm.data.tokens import Tokens

PIECE = 2**18
"""Bytes that are read, and characters that are tokenized, at once."""
MOST_PIECES = 8
"""Pieces without a place to cut, after which a text is refused."""
SEARCHED = 2048
"""Characters at the end of a piece in which a place to cut is looked for …"""
LOOKAHEAD = 256
"""… except for the last ones, whose tokens may change with what follows."""
TRIES = 16
"""Places of each kind that are tried."""
PLACES = (re.compile(r"(?<=\S)(?=\s)"), re.compile(r"(?<=\w)(?=[^\w\s])"), re.compile(r"(?s)(?=.)"))
"""Before white space; else between a word and a sign; else anywhere."""


class TokenFile(NamedTuple):
    """Ids of a long stream of texts in a file, one after the other."""

    path: Path
    """The file: nothing but the ids."""
    dtype: type[np.unsignedinteger]
    """uint16 for up to 65,536 tokens of a vocabulary, else uint32."""
    num_tokens: int
    """How many there are."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Reads the ids in [start, stop), or up to the last one."""
        count, size = min(stop, self.num_tokens) - start, np.dtype(self.dtype).itemsize
        return np.fromfile(self.path, self.dtype, count=count, offset=start * size).astype(np.int32)

    def windows(self, length: int) -> LazySequence[Tokens]:
        """Cuts the stream into the windows of `text_windows`, each of which is read when it is asked for.

        Args:
            length: Targets of a window, at least 1: the tokens that the model reads at once.

        Raises:
            ValueError: If `length` is below 1, or there are fewer than 2 tokens.
        """
        if length < 1:
            raise ValueError(f"length must be at least 1 token, got {length}.")
        if self.num_tokens < 2:
            raise ValueError(
                f"The text must have at least 2 tokens, one to predict from another, got {self.num_tokens}."
            )

        def window(index: int) -> Tokens:
            ids = self.read(index * length, (index + 1) * length + 1)
            return Tokens(ids, np.arange(len(ids)) > 0, truncated=False)

        return LazySequence(-(-(self.num_tokens - 1) // length), window)


def open_texts(
    source: str | Path, *, split: str = "train", encoding: str = "utf-8", block_size: int = PIECE
) -> Iterator[Iterable[str]]:
    """Yields each text of a source as an iterable of its blocks.

    A .txt file, alone or in a folder, is read a block at a time. Rows with `text` (.jsonl, .parquet, a dataset) are read
    one by one (`open_rows`), each as one block.

    Args:
        source: As in `read_rows`.
        split: As in `read_rows`.
        encoding: Of .txt files.
        block_size: Bytes of a block.

    Raises:
        FileNotFoundError: If there is no such file, folder or dataset.
        ValueError: When a text is read that is missing, blank or not in its encoding.
    """
    path = existing_path(source)
    if path is None or path.suffix in {".json", ".jsonl", ".parquet"}:
        yield from ([fields.text(row, "text")] for row in open_rows(source, split=split))
    else:
        files = text_files(path) if path.is_dir() else [path]
        yield from (text_blocks(file, encoding=encoding, block_size=block_size) for file in files)


def text_blocks(path: Path, *, encoding: str = "utf-8", block_size: int = PIECE) -> Iterator[str]:
    """Reads a text file a block at a time; no character is cut, and a byte-order mark is dropped.

    Raises:
        ValueError: If the file is not in this encoding (names the byte), or holds white space alone.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    position, blank = 0, True
    with path.open("rb") as file:
        while True:
            content = file.read(block_size)
            begin = position - len(decoder.getstate()[0])
            try:
                block = decoder.decode(content, final=not content)
            except UnicodeDecodeError as error:
                raise not_encoded(error, path, encoding, begin) from error
            yield block.removeprefix("\ufeff") if begin == 0 else block
            position, blank = position + len(content), blank and not block.strip()
            if not content:
                break
    if blank:
        raise fields.bad_field(Row(str(path), {}), "text", "empty", "a string with text")


def encode_blocks(blocks: Iterable[str], tokenizer: Tokenizer, *, piece_size: int = PIECE) -> Iterator[list[int]]:
    """Tokenizes one text in pieces: joined, the ids are those of the whole text (`encode_text`).

    Args:
        blocks: The text.
        tokenizer: One that gives a text back from its ids.
        piece_size: Characters of a piece at least.

    Raises:
        ValueError: If the tokens of the text depend on where it begins, wherever it might be cut.
    """
    pending = ""
    for block in blocks:
        pending += block
        if len(pending) < piece_size:
            continue
        ids = encode_text(pending, tokenizer)
        place, kept = _cut(pending, ids, tokenizer)
        if place:
            yield ids[:kept]
            pending = pending[place:]
        elif len(pending) > MOST_PIECES * piece_size:
            raise ValueError(
                f"This tokenizer cannot be applied piece by piece: in {len(pending):,} characters from {pending[:40]!r} "
                "there is no place to cut that leaves the tokens as they are. Give the text as rows (a .jsonl file with "
                "`text`), which are tokenized one by one, or leave streaming out."
            )
    yield encode_text(pending, tokenizer)


def _cut(text: str, ids: list[int], tokenizer: Tokenizer) -> tuple[int, int]:
    """Finds where to cut a text: the character, and the number of ids before it; (0, 0) if there is no place.

    The text behind the place must have, alone, the ids that it has within the text. The others then are those of the
    text before it, for a tokenizer gives the text back.
    """
    for kind in PLACES:
        found = kind.finditer(text, max(len(text) - SEARCHED, 1), max(len(text) - LOOKAHEAD, 1))
        for place in [match.start() for match in found][: -TRIES - 1 : -1]:
            tail = encode_text(text[place:], tokenizer)
            if tail == ids[len(ids) - len(tail) :]:
                return place, len(ids) - len(tail)
    return 0, 0


def write_tokens(
    folder: str | Path, source: str | Path, tokenizer: Tokenizer, *, split: str = "train", encoding: str = "utf-8"
) -> TokenFile:
    """Tokenizes the texts of a source into a file: one stream, with an EOS before, between and after them.

    The name of the file tells what it was made from: the tokenizer, and name, size and time of each file of the source.
    One that is there already is used again, so a resumed run reads what the run has read; others are deleted. (Of a source
    of `datasets`, whose files are not known, the file is made anew.)

    Args:
        folder: Where to write; 2 bytes a token (4 beyond 65,536 of them).
        source: As in `open_texts`.
        tokenizer: Gives the ids.
        split: As in `read_rows`.
        encoding: Of .txt files.

    Raises:
        FileNotFoundError: If there is no such source.
        ValueError: As `open_texts` and `encode_blocks` do.
    """
    dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 2**16 else np.uint32
    path = Path(folder) / f"{_fingerprint(source, tokenizer, split, encoding)}.bin"
    if existing_path(source) is None or not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob("*.bin"):
            old.unlink()
        eos, partial = np.array([tokenizer.eos_token_id], dtype), path.with_suffix(".partial")
        with partial.open("wb") as file:
            eos.tofile(file)
            for blocks in open_texts(source, split=split, encoding=encoding, block_size=PIECE):
                for ids in encode_blocks(blocks, tokenizer, piece_size=PIECE):
                    np.array(ids, dtype).tofile(file)
                eos.tofile(file)
        partial.rename(path)
    return TokenFile(path, dtype, path.stat().st_size // np.dtype(dtype).itemsize)


def _fingerprint(source: str | Path, tokenizer: Tokenizer, split: str, encoding: str) -> str:
    path = existing_path(source)
    files = [] if path is None else text_files(path) if path.is_dir() else [path]
    parts = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    made_from = [str(source), split, encoding, parts, tokenizer.eos_token_id, tokenizer.backend_tokenizer.to_str()]
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]


def first_characters(texts: Iterable[Iterable[str]], limit: int) -> Iterator[str]:
    """Yields texts until there are `limit` characters; the last one is cut.

    Example:
        >>> list(first_characters([["Once", " upon"], ["a time"]], 12))
        ['Once upon', 'a t']
    """
    for blocks in texts:
        text = ""
        for block in blocks:
            text += block[: limit - len(text)]
            if len(text) == limit:
                break
        yield text
        limit -= len(text)
        if not limit:
            return
