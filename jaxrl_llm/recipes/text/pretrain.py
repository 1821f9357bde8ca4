"""Pretraining: learn to predict the next token of raw text.

    jaxrl-llm pretrain --dataset shakespeare.txt --tokenizer bpe:4096 --output-dir runs/shakespeare
    jaxrl-llm pretrain --dataset books/ --eval-dataset held_out/ --max-length 512

The texts (a .txt file, a folder of them, or rows with `text`) become one stream, each with an end-of-text token before
and after it, which is cut into windows: every token is a target once. Of a single text the end is held out. Evaluation
reports bits per byte, which do not depend on the tokenizer.

The text is held in memory, at 4 bytes a token, unless it is streamed:

    jaxrl-llm pretrain --dataset books/ --eval-dataset held_out.txt --streaming

Then it is read in blocks and tokenized once, into a file of ids in `<output_dir>/tokens` (2 bytes a token; 4 for more than
65,536 different ones), from which each window is read when its turn comes: the same windows in the same order, in memory that
does not grow with the text. `bpe:N` is then learned from the first 16 million characters.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from jaxrl_llm.data import (
    LazySequence,
    Tokens,
    fields,
    read_rows,
    split_indices,
    text_windows,
    train_tokenizer,
    write_tokens,
)
from jaxrl_llm.data.streams import first_characters, open_texts
from jaxrl_llm.data.tokenizers import Tokenizer, encode_text
from jaxrl_llm.recipes.options import LearningRates, require
from jaxrl_llm.recipes.progress import facts
from jaxrl_llm.recipes.text import sft
from jaxrl_llm.recipes.text.language_model import LanguageModel, load_model, sizes
from jaxrl_llm.recipes.text.offline import run_keys, train_offline
from jaxrl_llm.recipes.text.offline_task import OfflineOptions, Task

BPE = "bpe:"
SAMPLE = 2**24
"""Characters from which a tokenizer is learned where the text is streamed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OfflineOptions):
    """Settings of pretraining."""

    output_dir: str = "runs/pretrain"
    """Folder for metrics, checkpoints and the trained model."""
    dataset: str
    """A .txt file, a folder of them, or rows with `text`: a .json, .jsonl or .parquet file, or the name of a dataset."""
    tokenizer: str = "gpt2"
    """Of a new model: `bpe:4096` (4,096 tokens, learned from the text), `gpt2`, a folder or hub id, or `characters:abc`."""
    max_length: int = 256
    """Tokens that the model reads at once: the width of a window."""
    streaming: bool = False
    """Tokenize into a file and read windows from it, for text larger than memory; eval_dataset says what to hold out."""
    z_loss: float = 0.0
    """Coefficient of the squared log-normaliser, against drifting logits; 1e-4 is common."""
    learning_rate: float | None = None
    """Peak learning rate; None: 1e-3 for a new model and for adapters, 1e-4 for a saved model."""
    default_learning_rates: ClassVar = LearningRates(new=1e-3, full=1e-4, adapters=1e-3)
    warmup_steps: int = 50
    """Steps over which the learning rate rises from 0."""
    per_device_train_batch_size: int = 16
    """Windows of a step."""


def validate(config: Config) -> None:
    """Checks the values of the settings.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_offline()
    if config.streaming:
        require("eval_dataset", config.eval_dataset, "the source of the held-out text where streaming is true", bool)
        meant = "false where streaming is true, for all windows but the last have the same length"
        require("group_by_length", config.group_by_length, meant, lambda value: not value)
    require("z_loss", config.z_loss, "at least 0", lambda value: value >= 0)
    if config.tokenizer.startswith(BPE):
        size = config.tokenizer.removeprefix(BPE)
        meant = "`bpe:` and the number of its tokens, at least 257"
        require("tokenizer", config.tokenizer, meant, lambda name: size.isdecimal() and int(size) >= 257)


def load_texts(config: Config) -> tuple[list[str], list[str]]:
    """Reads the texts to train on (none where they are streamed) and those held out: of several texts some, of one its end.

    Raises:
        ValueError: If a row has no `text`, or a single text is too short for its end to be held out.
    """
    if config.streaming:
        return [], _read_texts(config.eval_dataset, config.split)
    texts = _read_texts(config.dataset, config.split)
    if config.eval_dataset:
        return texts, _read_texts(config.eval_dataset, config.split)
    if len(texts) == 1:
        end = round(len(texts[0]) * (1 - config.eval_fraction))
        if not 0 < end < len(texts[0]):
            raise ValueError(f"{config.dataset} is too short to hold eval_fraction={config.eval_fraction} of it out.")
        return [texts[0][:end]], [texts[0][end:]]
    parts = split_indices(len(texts), held_out=config.eval_fraction, seed=0)
    train, held_out = ([texts[i] for i in indices] for indices in parts)
    return train, held_out


def _read_texts(dataset: str, split: str) -> list[str]:
    return [fields.text(row, "text") for row in read_rows(dataset, split=split)]


def stream(texts: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """Joins texts to one stream of ids, with an end-of-text token before, between and after them."""
    eos = np.array([tokenizer.eos_token_id], np.int32)
    encoded = (np.array([*encode_text(text, tokenizer), tokenizer.eos_token_id], np.int32) for text in texts)
    return np.concatenate([eos, *encoded])


def load_tokenizer(config: Config, texts: Sequence[str]) -> Tokenizer | None:
    """Learns the tokenizer of a new model, if it shall have one of its own: from the texts, or the first of a stream."""
    if config.model or not config.tokenizer.startswith(BPE):
        return None
    sample = first_characters(open_texts(config.dataset, split=config.split), SAMPLE) if config.streaming else texts
    return train_tokenizer(sample, int(config.tokenizer.removeprefix(BPE)))


def load_windows(config: Config, texts: Sequence[str], tokenizer: Tokenizer) -> Sequence[Tokens]:
    """Tokenizes the texts to train on, into memory or, where they are streamed, into a file, and cuts them into windows."""
    if not config.streaming:
        return text_windows(stream(texts, tokenizer), config.max_length)
    alone = "false with several processes, which would write the same file of tokens"
    require("streaming", config.streaming, alone, lambda _: jax.process_count() == 1)
    folder = Path(config.output_dir) / "tokens"
    facts("Tokenizing", {"from": config.dataset, "to": folder})
    return write_tokens(folder, config.dataset, tokenizer, split=config.split).windows(config.max_length)


def make_loss(model: LanguageModel, config: Config):
    """Makes `loss_fn(params, batch, key)`: that of `sft`, where every token of a window but its first is a target."""
    names = "dropout", "lora", "qlora", "lora_dropout", "chunk_size", "z_loss"
    return sft.make_loss(model, sft.Config(**{name: getattr(config, name) for name in names}))


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates and saves; returns the figures of the run.

    Returns:
        `eval_loss` (nats for each token), `eval_bits_per_byte` (of UTF-8) and the other metrics on the held-out text; of
        a complete run `model` (folder of the trained model).

    Raises:
        ValueError: If a setting or the text is wrong.
    """
    validate(config)
    texts = load_texts(config)
    model = load_model(config, run_keys(config.seed)[0], tokenizer=load_tokenizer(config, texts[0]))
    train = load_windows(config, texts[0], model.tokenizer)
    held_out = text_windows(stream(texts[1], model.tokenizer), config.max_length)
    num_bytes = sum(len(text.encode()) for text in texts[1])
    num_targets = sum(len(window.ids) - 1 for window in held_out)
    shown = {"training": _describe(train), "held out": f"{_describe(held_out)} from {num_bytes:,} bytes"}
    shown |= {"vocabulary": len(model.tokenizer)} | sizes(config, model)
    facts(f"Pretraining on {Path(config.dataset).name}", shown | {"folder": config.output_dir})
    quiet = dataclasses.replace(config.without_dropout(), z_loss=0.0)
    start = np.array([model.tokenizer.eos_token_id], np.int32)
    task = Task(
        label="pretrain",
        train=train,
        held_out=held_out,
        length=lambda window: len(window.ids),
        longest=max(len(train[0].ids), *(len(window.ids) for window in held_out)),
        collate=partial(sft.collate, model.pad_id),
        loss_fn=make_loss(model, config),
        evaluation_loss_fn=make_loss(model, quiet),
        weights_fn=sft.batch_weights,
        derive=lambda metrics: {"eval_bits_per_byte": metrics["eval_loss"] * num_targets / num_bytes / np.log(2)},
        prompts=[start, *(window.ids[:16] for window in held_out[1:])],
        show=("loss", "eval_loss", "eval_bits_per_byte"),
    )
    _, figures = train_offline(config, model, task)
    facts("Result", figures)
    return figures


def _describe(windows: Sequence[Tokens]) -> str:
    """Counts windows and their targets: only the last window has fewer than the first."""
    targets = (len(windows) - 1) * (len(windows[0].ids) - 1) + len(windows[-1].ids) - 1
    where = " (read when they are needed)" if isinstance(windows, LazySequence) else ""
    return f"{targets:,} tokens in {len(windows):,} windows{where}"
