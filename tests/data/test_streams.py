import os
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import Prepend

from jaxrl_llm.data import character_tokenizer, streams, text_windows, train_tokenizer, write_tokens
from jaxrl_llm.data.streams import encode_blocks, first_characters, open_texts, text_blocks
from jaxrl_llm.data.tokenizers import encode_text

ENGLISH = "It's 1,234 times   that he'd\tsay: \"so-called…\"\n\n  def f(x):\n    return x  # <|endoftext|> \r\nEnd. "
CHINESE = "道可道，非常道。名可名，非常名。無名天地之始；有名萬物之母。"
TEXTS = {
    "english": ENGLISH * 40,
    "chinese": CHINESE * 120,
    "mixed": (CHINESE + ENGLISH) * 30,
    "no white space and no signs": CHINESE.replace("，", "").replace("。", "").replace("；", "") * 120,
    "one sign alone": "=" * 3_001,
    "long white space": ("word" + " " * 700 + "\n" * 300) * 4,
}


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer([ENGLISH, CHINESE], 400)


def in_blocks(text, size):
    return (text[i : i + size] for i in range(0, len(text), size))


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("size", [600, 1000])
def test_pieces_have_the_ids_of_the_whole_text(gpt2, bpe, name, size):
    text = TEXTS[name]
    for tokenizer in (gpt2, bpe, character_tokenizer(text)):
        pieces = list(encode_blocks(in_blocks(text, 70), tokenizer, piece_size=size))
        assert len(pieces) > 1
        assert list(chain(*pieces)) == encode_text(text, tokenizer)


def test_a_piece_is_not_much_longer_than_asked_for(gpt2, monkeypatch):
    lengths, text = [], TEXTS["mixed"] * 5

    def noting(text, tokenizer):
        lengths.append(len(text))
        return encode_text(text, tokenizer)

    monkeypatch.setattr(streams, "encode_text", noting)
    pieces = encode_blocks(in_blocks(text, 500), gpt2, piece_size=3_000)
    assert list(chain(*pieces)) == encode_text(text, gpt2)
    assert max(lengths) < 3_000 + streams.SEARCHED + 500


def test_a_tokenizer_that_marks_the_beginning_of_a_text_is_refused():
    marked = train_tokenizer([ENGLISH], 300)
    marked.backend_tokenizer.normalizer = Prepend("^")
    text = ENGLISH.replace("<|endoftext|>", "")
    with pytest.raises(ValueError, match=r"cannot be applied piece by piece: in 5,\d00 characters from"):
        list(encode_blocks(in_blocks(text * 80, 100), marked, piece_size=650))
    (ids,) = encode_blocks([text], marked)  # what fits into a piece needs no cut
    assert ids == encode_text(text, marked)


@settings(deadline=None, max_examples=50)
@given(st.text(min_size=1).filter(str.strip), st.integers(1, 9))
def test_no_block_of_a_file_cuts_a_character(tmp_path_factory, text, size):
    path = tmp_path_factory.getbasetemp() / "blocks.txt"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "".join(text_blocks(path, block_size=size)) == text.removeprefix("\ufeff")


@pytest.mark.parametrize("size", [1, 5, 100])
def test_a_byte_that_is_no_text_is_named_with_its_place(tmp_path, size):
    (tmp_path / "latin.txt").write_bytes("道é ".encode() + "é ".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt: byte 6 of the file \(0xe9\) is not utf-8. Convert the file"):
        list(text_blocks(tmp_path / "latin.txt", block_size=size))
    (tmp_path / "cut.txt").write_bytes("ab道".encode()[:-1])
    with pytest.raises(ValueError, match=r"cut.txt: byte 2 of the file \(0xe9\) is not utf-8"):
        list(text_blocks(tmp_path / "cut.txt", block_size=size))


def test_a_blank_file_is_refused_as_in_memory(tmp_path):
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"blank.txt: field `text` is empty; expected a string with text"):
        [list(blocks) for blocks in open_texts(tmp_path / "blank.txt", block_size=1)]


def test_texts_come_from_a_folder_of_files_in_blocks_or_from_rows(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(name * 5)
    assert [list(filter(None, blocks)) for blocks in open_texts(tmp_path, block_size=2)] == [
        ["aa", "aa", "a"],
        ["bb", "bb", "b"],
    ]
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert list(open_texts(tmp_path / "rows.jsonl")) == [["one"], ["two"]]
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"prompt": "two"}\n')
    with pytest.raises(ValueError, match="line 2: field `text` is missing"):
        list(open_texts(tmp_path / "rows.jsonl"))


def test_a_file_of_ids_has_the_windows_of_the_text_in_memory(tmp_path, gpt2, monkeypatch):
    monkeypatch.setattr(streams, "PIECE", 1000)
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, text in enumerate(TEXTS.values()):
        (folder / f"{name}.txt").write_text(text, "utf-8")
    eos = gpt2.eos_token_id
    stream = [eos, *(token for text in TEXTS.values() for token in [*encode_text(text, gpt2), eos])]
    tokens = write_tokens(tmp_path / "tokens", folder, gpt2)
    assert (tokens.dtype, tokens.num_tokens) == (np.uint16, len(stream))
    assert tokens.path.stat().st_size == 2 * len(stream)
    for length in (7, len(stream) - 2, len(stream) - 1, 10**6):
        ours, expected = tokens.windows(length), text_windows(stream, length)
        assert len(ours) == len(expected)
        for one, other in zip(ours, expected, strict=True):
            assert (one.ids.dtype, one.truncated) == (other.ids.dtype, other.truncated)
            np.testing.assert_array_equal(one.ids, other.ids)
            np.testing.assert_array_equal(one.loss_mask, other.loss_mask)
    with pytest.raises(ValueError, match="length must be at least 1 token, got 0"):
        tokens.windows(0)


def test_a_file_of_ids_is_used_again_until_its_source_or_tokenizer_changes(tmp_path, gpt2, bpe):
    source = tmp_path / "text.txt"
    source.write_text("one two")

    def written(tokenizer=gpt2):
        tokens = write_tokens(tmp_path / "tokens", source, tokenizer)
        assert list(tokens.path.parent.iterdir()) == [tokens.path]
        return tokenizer.decode(tokens.read(1, tokens.num_tokens - 1)), tokens.path.stat().st_ino, tokens.path

    first = written()
    assert written() == first
    source.write_text("one two three")
    assert written()[0] == "one two three"
    assert written(bpe)[0] == "one two three"
    os.utime(source, ns=(1, 1))
    assert written(bpe)[2] != written()[2]


def test_a_dataset_whose_files_are_not_known_is_tokenized_anew(tmp_path, gpt2):
    for number, text in enumerate(("one two", "one four")):
        folder = tmp_path / "saved"
        Dataset.from_list([{"text": text}]).save_to_disk(tmp_path / str(number))
        shutil.rmtree(folder, ignore_errors=True)
        (tmp_path / str(number)).rename(folder)
        tokens = write_tokens(tmp_path / "tokens", folder, gpt2)
        assert gpt2.decode(tokens.read(1, tokens.num_tokens - 1)) == text


def test_a_file_that_was_left_unfinished_is_made_again(tmp_path, gpt2):
    (tmp_path / "text.txt").write_text("one two")
    whole = write_tokens(tmp_path, tmp_path / "text.txt", gpt2)
    Path(whole.path).rename(whole.path.with_suffix(".partial"))
    (tmp_path / "bad.txt").write_bytes(b"one \xff")
    with pytest.raises(ValueError, match=r"bad.txt: byte 4"):
        write_tokens(tmp_path, tmp_path / "bad.txt", gpt2)
    assert not list(tmp_path.glob("*.bin"))
    assert write_tokens(tmp_path, tmp_path / "text.txt", gpt2) == whole


def test_more_than_65536_tokens_take_four_bytes_each(tmp_path):
    tokenizer = character_tokenizer("".join(map(chr, (*range(33, 0xD800), *range(0xE000, 0x14000)))))
    assert len(tokenizer) > 2**16
    (tmp_path / "text.txt").write_text("\U00013fff!", "utf-8")
    tokens = write_tokens(tmp_path, tmp_path / "text.txt", tokenizer)
    assert (tokens.dtype, tokens.num_tokens) == (np.uint32, 4)
    assert tokenizer.decode(tokens.read(1, 3)) == "\U00013fff!"


@pytest.mark.parametrize(
    ("limit", "expected"), [(3, ["Onc"]), (9, ["Once upon"]), (11, ["Once upon", "a "]), (99, None)]
)
def test_a_sample_has_the_first_texts_up_to_a_limit(limit, expected):
    texts = [["Once", " upon"], ["a time"]]
    assert list(first_characters(iter(texts), limit)) == (expected or ["Once upon", "a time"])
