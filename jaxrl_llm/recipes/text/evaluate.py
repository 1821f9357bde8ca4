"""Evaluate a saved model on rows: perplexity, right answers, preferences, ratings.

    jaxrl-llm evaluate --model runs/sft/model --dataset held_out.jsonl
    jaxrl-llm evaluate --model runs/grpo/model --dataset sums --num-generations 1
    jaxrl-llm evaluate --model runs/dpo/model --reference runs/sft/model --dataset pairs.jsonl --output-file dpo.json

| rows | what is measured |
|---|---|
| `text` | loss, perplexity, bits per byte |
| `prompt` + `completion`, `messages`, `instruction` + `output` | loss, perplexity, token accuracy of the completions |
| the same, or `prompt` alone, and `--num-generations k` | share of right completions, pass@1 to pass@k |
| `chosen` + `rejected` | preference accuracy, by log-probability or by the reward of a reward model |
| `score` or `rating` | a reward model's squared error and correlation |

The first row tells which they are. With `--reference`, texts and completions also give its loss, pairs the accuracy of the
log-ratios (the rewards of DPO), and all three the KL divergence of the model's next-token predictions from those of the
reference, summed over a response: an estimate of KL(model‖reference) where the responses are the model's own.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from jaxrl_llm.data import (
    PromptExample,
    Row,
    fields,
    preference_example,
    prompt_example,
    rated_example,
    supervised_example,
)
from jaxrl_llm.models import ScalarHead, is_reward_model
from jaxrl_llm.recipes.options import ModelOptions, require, require_at_least
from jaxrl_llm.recipes.progress import facts, table
from jaxrl_llm.recipes.text import measures
from jaxrl_llm.recipes.text.language_model import LanguageModel, load_model, read_dataset, require_room
from jaxrl_llm.recipes.text.measures import Examiner, Measured
from jaxrl_llm.recipes.text.reward_model import load_reward_model
from jaxrl_llm.rewards import Reward, exact_match, load_reward, numeric_match
from jaxrl_llm.types import Key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of an evaluation."""

    model: str
    """Folder, .gguf file or hub id of a language model, or folder of a reward model."""
    dataset: str
    """`wordnet`, `sums`, a .json, .jsonl, .parquet or .txt file, or the name of a dataset."""
    split: str = "train"
    """Split of a dataset that has several."""
    rows: Literal["auto", "texts", "completions", "prompts", "pairs", "ratings"] = "auto"
    """What the rows are; auto: what the columns of the first row say."""
    max_rows: int = 0
    """Rows to take, the first of the dataset; 0: all."""
    adapter: str = ""
    """Folder of adapters in PEFT's format that are merged into the model."""
    reference: str = ""
    """Folder, .gguf file or hub id of a language model to compare with."""
    max_length: int = 0
    """Tokens after which a row is cut (a text: into windows); 0: as many as the model reads."""
    per_device_eval_batch_size: int = 32
    """Rows that are worked on together; it changes no figure but those of completions that are sampled."""
    num_generations: int = 0
    """Completions of each prompt, to be compared with the answer; 0: none."""
    max_completion_length: int = 64
    """Longest of these completions, in tokens."""
    temperature: float = 0.0
    """0 takes the most likely token each time; 1 samples from the model's distribution."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have probability p."""
    match: Literal["exact", "numeric", "contains"] = "exact"
    """A completion is right if it is the answer, if its last number is that of the answer, or if it contains the answer."""
    reward_funcs: tuple[str, ...] = ()
    """Reward functions instead of match, as package.module:function or path/file.py:function."""
    reward_threshold: float = 1.0
    """Least sum of their rewards at which a completion counts as right."""
    num_samples: int = 3
    """Rows to show."""
    output_file: str = ""
    """A .json file for settings, figures and samples; empty: none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type to compute in."""
    chunk_size: int = 128
    """Positions along time whose logits exist at once."""
    seed: int = 0
    """Seed of the sampling."""


def validate(config: Config) -> None:
    """Checks the values of the settings.

    Raises:
        ValueError: Naming the setting, what came and what was meant.
    """
    names = ("max_rows", "max_length", "num_generations", "num_samples", "seed")
    require_at_least(0, **{name: getattr(config, name) for name in names})
    names = ("per_device_eval_batch_size", "max_completion_length", "chunk_size")
    require_at_least(1, **{name: getattr(config, name) for name in names})
    require("max_length", config.max_length, "at least 2 tokens, or 0", lambda length: length != 1)
    require("model", config.model, "the folder or hub id of a model", bool)
    require("temperature", config.temperature, "at least 0", lambda t: t >= 0)
    require("top_p", config.top_p, "in (0, 1]", lambda p: 0 < p <= 1)
    meant = "positive for several num_generations: greedy completions are all the same"
    require("temperature", config.temperature, meant, lambda t: t > 0 or config.num_generations < 2)
    meant = "empty where num_generations is 0: they judge completions"
    require("reward_funcs", config.reward_funcs, meant, lambda names: not names or config.num_generations > 0)
    require("output_file", config.output_file, "a .json file", lambda name: not name or name.endswith(".json"))


def run(config: Config) -> dict[str, Any]:
    """Measures, prints and returns the figures; see `measures` for their names.

    Raises:
        ValueError: If a setting or a row is wrong, or the model is not one that the rows are for.
    """
    validate(config)
    rows = read_dataset(config.dataset, config.split)
    rows = rows[: config.max_rows or len(rows)]
    kind = kind_of(rows[0]) if config.rows == "auto" else config.rows
    key = jax.random.key(config.seed)
    examiner = _examiner(config, key)
    _require_fit(config, kind, examiner.model)
    model = {"model": config.model} | ({"reference": config.reference} if config.reference else {})
    facts(f"Evaluation on {config.dataset}", {kind: len(rows), **model, "parameters": examiner.model.num_params})
    measured = _measure(config, kind, rows, examiner, key)
    facts("Result", measured.figures)
    if measured.samples:
        cells = [[_shortened(cell) for cell in sample.values()] for sample in measured.samples]
        table("Samples", list(measured.samples[0]), cells)
    if config.output_file:
        content = {"config": dataclasses.asdict(config), "figures": measured.figures, "samples": measured.samples}
        Path(config.output_file).parent.mkdir(parents=True, exist_ok=True)
        Path(config.output_file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return measured.figures


def kind_of(row: Row) -> str:
    """Tells what a row is from its columns: "pairs", "ratings", "completions", "prompts" or "texts".

    Raises:
        ValueError: If it is nothing of the kind.

    Example:
        >>> from jaxrl_llm.data import as_rows
        >>> [kind_of(row) for row in as_rows([{"text": "Once"}, {"prompt": "3+4=", "answer": 7}])]
        ['texts', 'prompts']
    """
    columns = fields.present(row)
    if {"chosen", "rejected"} & columns:
        return "pairs"
    if {"score", "rating"} & columns:
        return "ratings"
    if {"messages", "conversations"} & columns or columns >= {"instruction", "output"}:
        return "completions"
    if {"prompt", "instruction"} & columns:
        return "completions" if "completion" in columns else "prompts"
    if "text" in columns:
        return "texts"
    raise ValueError(
        f"{row.where}: nothing can be evaluated on the columns {sorted(columns)}. Accepted are: `text`; `prompt` "
        "(+ `completion` or `answer`); `instruction` (+ `output`); `messages`; `chosen` + `rejected`; `score` or `rating`."
    )


def question(row: Row, kind: str) -> PromptExample:
    """Reads a row as a prompt, with its completion as the `answer` unless it has a column of this name.

    Of a conversation, what the assistant says last is the answer.
    """
    if kind == "prompts":
        return prompt_example(row)
    prompt, completion = supervised_example(row)
    if not isinstance(completion, str):
        turns = (*(prompt if isinstance(prompt, tuple) else ()), *completion)
        last = max(i for i, message in enumerate(turns) if message.role == "assistant")
        prompt, completion = turns[:last], turns[last].content
    columns = {name: value for name, value in row.fields.items() if value is not None}
    return PromptExample(prompt, {"answer": completion} | columns)


def contains_match(completions: Sequence[Any], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """Rewards 1 for a completion in which the answer stands, else 0 (arguments as `rewards.exact_match`).

    Example:
        >>> contains_match(["The capital is Paris."], answer=["Paris"])
        [1.0]
    """
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [
        None if right is None else float(str(right).strip() in text) for text, right in zip(texts, answer, strict=True)
    ]


MATCHES: dict[str, Reward] = {"exact": exact_match, "numeric": numeric_match, "contains": contains_match}


def _examiner(config: Config, key: Key) -> Examiner:
    options = ModelOptions(model=config.model, adapter=config.adapter, dtype=config.dtype)
    model = load_reward_model(options, key) if is_reward_model(config.model) else load_model(options, key)
    reference = None
    if config.reference:
        reference = load_model(dataclasses.replace(options, model=config.reference, adapter=""), key)
        if reference.tokenizer.get_vocab() != model.tokenizer.get_vocab():
            raise ValueError(f"reference={config.reference!r} has another vocabulary than model={config.model!r}.")
    max_length = config.max_length or model.context_length
    for each in filter(None, (model, reference)):
        require_room(each, max_length, "lower max_length")
    return Examiner(
        model._replace(params=jax.device_put(model.params)),
        reference and reference._replace(params=jax.device_put(reference.params)),
        max_length,
        config.per_device_eval_batch_size,
        config.chunk_size,
        config.num_samples,
    )


def _require_fit(config: Config, kind: str, model: LanguageModel) -> None:
    """Checks that the model and the settings are for rows of this kind."""
    by_reward = isinstance(model.module, ScalarHead)
    if by_reward and kind not in ("pairs", "ratings"):
        raise ValueError(
            f"model={config.model!r} is a reward model, which judges pairs and ratings; {config.dataset} has {kind}."
        )
    if kind == "ratings" and not by_reward:
        raise ValueError(
            f"{config.dataset} has ratings, which a reward model predicts, but model={config.model!r} is a language "
            "model. Train a reward model (jaxrl-llm reward-model), or measure how likely the texts are with --rows texts."
        )
    if by_reward and config.reference:
        raise ValueError(f"reference={config.reference!r} is for language models; {config.model!r} is a reward model.")
    asks = kind in ("completions", "prompts")
    if config.num_generations and not asks:
        raise ValueError(f"num_generations={config.num_generations} needs rows with prompts to complete, not {kind}.")
    if kind == "prompts" and not config.num_generations:
        raise ValueError(
            f"{config.dataset} has prompts without completions: set num_generations to let the model answer."
        )
    if config.num_generations:
        require_room(model, config.max_completion_length, "lower max_completion_length")


def _measure(config: Config, kind: str, rows: Sequence[Row], examiner: Examiner, key: Key) -> Measured:
    if kind == "texts":
        return measures.measure_texts(examiner, [fields.text(row, "text") for row in rows])
    if kind == "pairs":
        by_reward = isinstance(examiner.model.module, ScalarHead)
        measure = measures.measure_reward_pairs if by_reward else measures.measure_pairs
        return measure(examiner, [preference_example(row) for row in rows])
    if kind == "ratings":
        return measures.measure_ratings(examiner, [rated_example(row) for row in rows])
    questions = [question(row, kind) for row in rows] if config.num_generations else []
    likely = None
    if kind == "completions":
        likely = measures.measure_completions(examiner, [supervised_example(row) for row in rows])
    if not questions:
        assert likely is not None
        return likely
    right = measures.measure_generations(
        examiner,
        questions,
        [load_reward(name) for name in config.reward_funcs] or [MATCHES[config.match]],
        key,
        num_generations=config.num_generations,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        top_p=config.top_p,
        reward_threshold=config.reward_threshold,
    )
    return right if likely is None else Measured(likely.figures | right.figures, right.samples)


def _shortened(cell: Any) -> Any:
    return f"{cell[:240]}…" if isinstance(cell, str) and len(cell) > 240 else cell
