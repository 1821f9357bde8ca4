"""Supervised fine-tuning (SFT): learn to give the responses of a dataset.

    jaxrl-llm sft                                      # a new 4-layer GPT-2 learns to define English words (WordNet)
    jaxrl-llm sft --dataset chat.jsonl --model my/gpt2 --output-dir runs/chat --packing

The loss is the mean negative log-likelihood over the tokens of all responses of a batch, with their EOS; prompts and
padding teach nothing. Rows may be `instruction`/`input`/`output`, `messages` or `conversations`, `prompt`/`completion`,
or `text`. The trained model is saved to `<output_dir>/model` in Hugging Face's layout.
"""

import dataclasses
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.data import (
    LazyTokens,
    PackedTokens,
    Row,
    SupervisedExample,
    TokenizedRows,
    Tokens,
    collate_packed,
    collate_sft,
    count_rows_without_targets,
    open_rows,
    pack_rows,
    supervised_example,
    tokenize_sft,
    tokenize_sft_rows,
)
from jaxrl_llm.data.packing import PackingStrategy
from jaxrl_llm.losses import cross_entropy_loss
from jaxrl_llm.losses.cross_entropy import SFTLossType
from jaxrl_llm.recipes.options import LearningRates, require
from jaxrl_llm.recipes.progress import facts
from jaxrl_llm.recipes.text.language_model import LanguageModel, complete, load_model
from jaxrl_llm.recipes.text.offline import report, require_rows_fit, run_keys, train_offline
from jaxrl_llm.recipes.text.offline_task import (
    OfflineOptions,
    Task,
    load_examples,
    load_splits,
    real_rows,
    sample_prompts,
)
from jaxrl_llm.reductions import token_weights
from jaxrl_llm.rollouts import score_tokens
from jaxrl_llm.types import Key, Metrics, Params, Scalar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(OfflineOptions):
    """Settings of supervised fine-tuning."""

    output_dir: str = "runs/sft"
    """Folder for metrics, checkpoints and the trained model."""
    dataset: str = "wordnet"
    """`wordnet`, `sums`, a .json, .jsonl or .parquet file, or the name of a dataset."""
    completion_only_loss: bool = True
    """Learn the completions only; if false, prompts too."""
    assistant_only_loss: bool = True
    """Of conversations, learn what the assistant says; if false, all turns."""
    loss_type: SFTLossType = "nll"
    """Negative log-likelihood, or dft (dynamic fine-tuning), in which unlikely tokens teach less."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over the vocabulary."""
    z_loss: float = 0.0
    """Coefficient of the squared log-normaliser, against drifting logits; 1e-4 is common."""
    streaming: bool = False
    """Read and tokenize rows when they are needed, for data larger than memory; eval_dataset says what to hold out."""
    packing: bool = False
    """Put several rows into one of max_length tokens, without their seeing one another."""
    packing_strategy: PackingStrategy = "bfd"
    """How: bfd (best fit decreasing), bfd_split (rows beyond max_length go on in another), wrapped (cut anywhere)."""
    neftune_noise_alpha: float = 0.0
    """Scale of uniform noise on the embeddings in training (NEFTune); 5 is common, 0 is off."""
    learning_rate: float | None = None
    """Peak learning rate; None: 2e-5 for a saved model, 2e-4 for adapters, 1e-3 for a new model."""
    default_learning_rates: ClassVar = LearningRates(new=1e-3, full=2e-5, adapters=2e-4)
    warmup_steps: int = 50
    """Steps over which the learning rate rises from 0."""
    num_train_epochs: float = 3.0
    """Passes over the training rows, unless max_steps says otherwise."""
    eval_exact_match: bool = False
    """Complete held-out prompts greedily before and after, and report the share of completions that are exactly right."""


class Batch(NamedTuple):
    """Rows of text, padded on the right."""

    tokens: Int[Array, "batch time"]
    mask: Bool[Array, "batch time"]
    loss_mask: Bool[Array, "batch time"]
    real: Bool[Array, " batch"]
    truncated: Bool[Array, " batch"]
    segment_ids: Int[Array, "batch time"] | None = None
    weights: Float[Array, "batch targets"] | None = None


def validate(config: Config) -> None:
    """Checks the values of the settings.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    config.validate_offline()
    require("label_smoothing", config.label_smoothing, "in [0, 1)", lambda share: 0 <= share < 1)
    for name in ("z_loss", "neftune_noise_alpha"):
        require(name, getattr(config, name), "at least 0", lambda value: value >= 0)
    if config.streaming:
        require("eval_dataset", config.eval_dataset, "the source of the held-out rows where streaming is true", bool)
        for name in ("packing", "group_by_length"):
            meant = "false where streaming is true, for it needs the lengths of all rows"
            require(name, getattr(config, name), meant, lambda value: not value)


def make_loss(model: LanguageModel, config: Config):
    """Makes `loss_fn(params, batch, key)`: the cross-entropy of each response token given those before it."""
    noisy = config.drops_out or config.neftune_noise_alpha > 0

    def loss_fn(params: Params, batch: Batch, key: Key) -> tuple[Scalar, Metrics]:
        statistics = score_tokens(
            model.apply,
            model.head_kernel,
            params,
            batch.tokens,
            batch.mask,
            segment_ids=batch.segment_ids,
            chunk_size=config.chunk_size,
            dropout_key=key if noisy else None,
            neftune_noise_alpha=config.neftune_noise_alpha,
        )
        return cross_entropy_loss(
            statistics.log_probs,
            batch.loss_mask[:, 1:],
            loss_type=config.loss_type,
            label_smoothing=config.label_smoothing,
            z_loss=config.z_loss,
            statistics=statistics,
            weights=batch.weights,
        )

    return loss_fn


def batch_weights(batch: Batch, axis_name: str | None) -> Float[Array, "batch targets"]:
    """Makes the weights of a whole batch, of all tokens but the first: the mean over all response tokens."""
    return token_weights(batch.loss_mask[:, 1:] & batch.real[:, None], "token_mean", axis_name=axis_name)


def collate(pad_id: int, rows: Sequence[Tokens], length: int) -> Batch:
    """Makes a batch of rows."""
    arrays = map(jnp.asarray, collate_sft(rows, pad_id=pad_id, length=length))
    return Batch(*arrays, real=real_rows(rows), truncated=jnp.asarray([bool(row.truncated) for row in rows]))


def collate_packs(pad_id: int, rows: Sequence[PackedTokens], length: int) -> Batch:
    """Makes a batch of packed rows."""
    batch = collate_packed(rows, pad_id=pad_id, length=length)
    arrays = map(jnp.asarray, (batch.tokens, batch.mask, batch.loss_mask))
    real = real_rows(rows)
    return Batch(*arrays, real=real, truncated=~real, segment_ids=jnp.asarray(batch.segment_ids))


def count_cut(batch: Batch) -> dict[str, int]:
    """Counts the rows of a batch that `max_length` cut, and those of which it left nothing to learn.

    (Where rows are streamed, nobody could count them before.)
    """
    empty = count_rows_without_targets(np.asarray(batch.loss_mask))
    return {"num_rows_truncated": int(batch.truncated.sum()), "num_rows_without_targets": empty}


class Data(NamedTuple):
    """What is learned and what is held out.

    Attributes:
        train: Rows to learn from.
        train_note: What is known of them.
        held_out: Rows to evaluate on.
        asked: The examples that these are made from.
    """

    train: Sequence[Tokens]
    train_note: str
    held_out: TokenizedRows[Tokens]
    asked: list[SupervisedExample]


def load_data(config: Config, model: LanguageModel) -> Data:
    """Reads and tokenizes the rows, those to learn from lazily where `streaming` is true.

    Raises:
        ValueError: If a row is wrong, or there is none.
    """
    read = partial(_read, config)
    options: dict[str, Any] = {
        "max_length": config.max_length,
        "completion_only_loss": config.completion_only_loss,
        "assistant_only_loss": config.assistant_only_loss,
    }
    if config.packing and config.packing_strategy != "bfd":
        options["max_length"] = sys.maxsize  # what is beyond max_length goes on in another row

    def tokenize(examples: Sequence[SupervisedExample]) -> TokenizedRows[Tokens]:
        return tokenize_sft_rows(examples, model.tokenizer, **options)

    if config.streaming:
        rows = open_rows(config.dataset, split=config.split)
        train = LazyTokens(rows, lambda row: tokenize_sft(read(row), model.tokenizer, **options))
        train_note = f"{len(rows):,} rows, read when they are needed"
        examples = load_examples(config, config.eval_dataset, read)
        held_out = tokenize(examples)
    else:
        parts = load_splits(config, read)
        (tokenized, held_out), examples = map(tokenize, parts), parts[1]
        train, train_note = tokenized.rows, str(tokenized)
    return Data(train, train_note, held_out, [examples[index] for index in held_out.kept])


def run(config: Config) -> dict[str, Any]:
    """Trains, evaluates and saves; returns the figures of the run.

    Returns:
        `eval_loss` (nats for each token) and the other metrics on the held-out rows; of a complete run `model` (folder
        of the trained model) and, if asked for, `eval_exact_match_before` and `eval_exact_match`.

    Raises:
        ValueError: If a setting or a row of the data is wrong.
    """
    validate(config)
    model = load_model(config, run_keys(config.seed)[0])
    data = load_data(config, model)
    report("SFT", config, model, data.train_note, data.held_out)
    quiet = dataclasses.replace(config.without_dropout(), neftune_noise_alpha=0.0)
    prompts = sample_prompts(data.asked, model.tokenizer)

    def pack(rows: Sequence[Tokens]) -> Sequence[Any]:
        return pack_rows(rows, config.max_length, packing_strategy=config.packing_strategy) if config.packing else rows

    task = Task(
        label="sft",
        train=pack(data.train),
        held_out=pack(data.held_out.rows),
        length=lambda row: len(row.ids),
        collate=partial(collate_packs if config.packing else collate, model.pad_id),
        loss_fn=make_loss(model, config),
        evaluation_loss_fn=make_loss(
            model, dataclasses.replace(quiet, loss_type="nll", label_smoothing=0.0, z_loss=0.0)
        ),
        weights_fn=batch_weights,
        describe=count_cut if config.streaming else lambda batch: {},
        prompts=prompts,
        show=("loss", "eval_loss", "eval_mean_token_accuracy"),
    )

    def exact_match(params: Params) -> float:
        longest = max(int(row.loss_mask.sum()) for row in data.held_out.rows)
        room = model.context_length - max(map(len, prompts)) + 1  # an answer beyond it counts as wrong
        texts = complete(model, params, prompts, jax.random.key(0), max_new_tokens=min(longest, room))
        return float(np.mean([text == example.completion for text, example in zip(texts, data.asked, strict=True)]))

    require_rows_fit(config, model, task)
    before = {"eval_exact_match_before": exact_match(model.params)} if config.eval_exact_match else {}
    params, figures = train_offline(config, model, task)
    if config.eval_exact_match and "model" in figures:
        before["eval_exact_match"] = exact_match(params)
    facts("Result", figures | before)
    return figures | before


def _read(config: Config, row: Row) -> SupervisedExample:
    example = supervised_example(row)
    if config.eval_exact_match and not (example.prompt and isinstance(example.completion, str)):
        raise ValueError(
            "eval_exact_match needs rows that ask for one text (`prompt` and `completion`, or `instruction` and "
            f"`output`); {row.where} is a conversation or plain text."
        )
    return example
