"""Tokenizers for the tests of data: made once."""

import pytest

from jaxrl_llm.data import character_tokenizer, load_tokenizer
from tests.data.chat import CHATML


@pytest.fixture(scope="session")
def gpt2():
    return load_tokenizer("gpt2")


@pytest.fixture(scope="session")
def digits():
    return character_tokenizer("0123456789+=")


@pytest.fixture
def chatml():
    """GPT-2's BPE with the ChatML template, whose turns end with EOS."""
    tokenizer = load_tokenizer("gpt2")
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer
