"""Prompts with the columns that rewards read, and rewards of their completions, on the host or traced."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.data import PromptExample, collate_prompts, reward_columns, tokenize_prompt_rows
from jaxrl_llm.data.tokenizers import Tokenizer, encode_text
from jaxrl_llm.recipes.text import model_rewards
from jaxrl_llm.recipes.text.language_model import LanguageModel, decode
from jaxrl_llm.reductions import masked_mean, masked_std
from jaxrl_llm.rewards import OnError, evaluate_rewards, load_reward
from jaxrl_llm.rollouts import Completions
from jaxrl_llm.types import Metrics

Columns: TypeAlias = Mapping[str, Array]
TraceableReward: TypeAlias = Callable[[Completions, Columns], Float[Array, "rows *functions"]]
"""`reward(completions, columns) -> [rows]` or `[rows, functions]`: the columns are arrays with one row for each completion;
`prompt_ids` and `prompt_mask` are among them."""


class Prompts(NamedTuple):
    """Prompts of an iteration, with the arrays that a traceable reward reads."""

    ids: Int[Array, "batch time"]
    mask: Bool[Array, "batch time"]
    columns: Columns


class PromptTable(NamedTuple):
    """All prompts of a dataset: tokens, texts and columns, on the host; every field has one entry for each prompt."""

    tokens: list[np.ndarray]
    texts: list[Any]
    """Strings, or lists of messages `{"role", "content"}`."""
    columns: dict[str, list[Any]]
    arrays: dict[str, np.ndarray]
    """Numeric columns as they are; a column of text `answer` as `answer_ids` and `answer_mask`."""
    length: int
    """Tokens to which prompts are padded: the length of the longest, rounded up where the model has room."""

    @property
    def longest(self) -> int:
        """Length of the longest prompt."""
        return max(map(len, self.tokens))

    def batch(self, indices: Sequence[int] | np.ndarray, pad_id: int) -> Prompts:
        """Collates some of the prompts, left-padded to the length of all, so that one shape compiles."""
        rows = collate_prompts([self.tokens[i] for i in indices], pad_id=pad_id, length=self.length)
        columns = {name: jnp.asarray(values[np.asarray(indices)]) for name, values in self.arrays.items()}
        ids, mask = jnp.asarray(rows.prompt_ids), jnp.asarray(rows.prompt_mask)
        return Prompts(ids, mask, {**columns, "prompt_ids": ids, "prompt_mask": mask})


def make_prompt_table(
    model: LanguageModel, examples: Sequence[PromptExample], *, max_prompt_length: int
) -> PromptTable:
    """Tokenizes prompts and their columns; prompts that are too long are left out."""
    tokenized = tokenize_prompt_rows(examples, model.tokenizer, max_prompt_length=max_prompt_length)
    kept = [examples[i] for i in tokenized.kept]
    columns = reward_columns(kept)
    arrays: dict[str, np.ndarray] = {}
    for name, values in columns.items():
        if all(isinstance(value, str) for value in values):
            arrays |= _text_arrays(name, values, model)
        elif all(isinstance(value, bool | int | float) for value in values):
            arrays[name] = np.asarray(values)
    length = -(-max(len(ids) for ids in tokenized.rows) // 8) * 8
    return PromptTable(tokenized.rows, [plain_prompt(example.prompt) for example in kept], columns, arrays, length)


def _text_arrays(name: str, values: Sequence[str], model: LanguageModel) -> dict[str, np.ndarray]:
    rows = [encode_text(value, model.tokenizer) for value in values]
    width = max(max(map(len, rows)), 1)
    ids = np.array([row + [model.pad_id] * (width - len(row)) for row in rows], np.int32)
    mask = np.arange(width) < np.array([len(row) for row in rows])[:, None]
    return {f"{name}_ids": ids, f"{name}_mask": mask}


def plain_prompt(prompt: Any) -> Any:
    """Gives a reward what TRL would: a string, or a list of message dicts."""
    if isinstance(prompt, tuple):
        return [message._asdict() for message in prompt]
    return prompt if isinstance(prompt, str) else "\n".join(filter(None, (prompt.instruction, prompt.input)))


@partial(jax.tree_util.register_dataclass, data_fields=["functions"], meta_fields=["names", "eos_ids"])
@dataclasses.dataclass(frozen=True)
class JoinedReward:
    """Traceable functions `reward(completion_ids, completion_mask, **columns) -> [rows]` as one, `[rows, functions]`.

    A pytree: as an argument of a compiled program it brings the parameters of its functions.

    Each is given the arguments that it names (`eos_id`, `prompt_ids` and `prompt_mask` among them), or all if it takes
    `**columns`. What is not finite counts as NaN: the function does not apply there.

    Attributes:
        names: Of the functions, for messages.
        functions: The functions; pytrees, as `jax.tree_util.Partial` makes them of plain ones.
        eos_ids: The tokens that end a completion. A function is given one as the number `eos_id`, several as an array.
    """

    names: tuple[str, ...]
    functions: tuple[Callable, ...]
    eos_ids: tuple[int, ...]

    def __call__(self, completions: Completions, columns: Columns) -> Float[Array, "rows functions"]:
        """Scores completions.

        Raises:
            ValueError: If a function names an argument that is not there, or returns anything but one number for each
                completion.
        """
        # What was sampled comes last: a dataset may have a column `completion` of its own.
        eos_id = self.eos_ids[0] if len(self.eos_ids) == 1 else jnp.array(self.eos_ids, jnp.int32)
        given = {**columns, "completion_ids": completions.ids, "completion_mask": completions.mask, "eos_id": eos_id}
        rows = completions.ids.shape[0]
        scores = []
        for function, name in zip(self.functions, self.names, strict=True):
            values = function(**_arguments(function, name, given))
            if jnp.shape(values) != (rows,):
                raise ValueError(
                    f"The traceable reward {name!r} returned shape {jnp.shape(values)}; expected one number for each of "
                    f"the {rows} completions."
                )
            values = jnp.asarray(values, jnp.float32)
            scores.append(jnp.where(jnp.isfinite(values), values, jnp.nan))
        return jnp.stack(scores, axis=1)


def load_traceable_reward(
    names: Sequence[str], eos_ids: Sequence[int], *, tokenizer: Tokenizer | None = None
) -> JoinedReward:
    """Loads traceable reward functions by name.

    Args:
        names: As `load_reward` takes them, or "reward_model:path/to/folder".
        eos_ids: The tokens that end a completion.
        tokenizer: That of the policy: a reward model must have its tokens.

    Raises:
        ValueError: If a name is wrong, or a reward model has other tokens.
    """
    return JoinedReward(tuple(names), tuple(_load_traceable(name, tokenizer) for name in names), tuple(eos_ids))


def function_metrics(names: Sequence[str], rewards: Float[Array, "rows functions"]) -> Metrics:
    """Computes mean and deviation of each traceable reward where it applies, and the share of completions where not."""
    metrics: Metrics = {}
    for index, name in enumerate(names):
        short = name.partition("(")[0].rpartition(":")[2].rpartition("/")[2] or name
        short = f"{short}_{index + 1}" if f"rewards/{short}/mean" in metrics else short
        values, applies = rewards[:, index], ~jnp.isnan(rewards[:, index])
        metrics[f"rewards/{short}/mean"] = masked_mean(values, applies)
        metrics[f"rewards/{short}/std"] = masked_std(values, applies)
        metrics[f"rewards/{short}/missing"] = jnp.mean(~applies)
    return metrics


def _load_traceable(name: str, tokenizer: Tokenizer | None) -> Callable:
    if not name.startswith(model_rewards.PREFIX):
        return jax.tree_util.Partial(load_reward(name))
    return model_rewards.load_token_reward(name.removeprefix(model_rewards.PREFIX), tokenizer)


def _arguments(function: Callable, name: str, given: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return given
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in given]
    if missing:
        raise ValueError(
            f"The traceable reward {name!r} needs {missing}; there are {sorted(given)}. A column of text `answer` comes "
            "as `answer_ids` and `answer_mask`."
        )
    return {p.name: given[p.name] for p in parameters if p.name in given}


class HostRewards(NamedTuple):
    """Python reward functions, called on decoded text; `prompt_ids` and `completion_ids` are columns.

    Attributes:
        model: The policy.
        functions: Reward functions.
        errors: What a function does that fails, `on_error` of `evaluate_rewards`.
        timeout: Seconds that each function may take for the completions of an iteration; None or 0: no limit.
    """

    model: LanguageModel
    functions: list[Callable]
    errors: OnError = "raise"
    timeout: float | None = None

    def __call__(
        self, table: PromptTable, indices: np.ndarray, completions: Completions
    ) -> tuple[Float[np.ndarray, "rows functions"], dict[str, Any]]:
        """Scores the completions of some prompts.

        Returns:
            Rewards by each function, NaN where it does not apply, and `rewards/<name>/mean` and `rewards/<name>/std` where
            it does; where errors are ignored, `rewards/<name>/errors` too, the number of completions on which it failed.
        """
        texts = decode(self.model.tokenizer, completions.ids, completions.mask)
        rows = np.repeat(indices, len(texts) // len(indices))
        prompts = [table.texts[i] for i in rows]
        if prompts and not isinstance(prompts[0], str):
            texts = [[{"role": "assistant", "content": text}] for text in texts]
        columns = {name: [values[i] for i in rows] for name, values in table.columns.items()}
        # What was sampled comes last: a dataset may have a column of this name.
        columns["prompt_ids"] = [table.tokens[i].tolist() for i in rows]
        columns["completion_ids"] = _id_lists(completions)
        scored = evaluate_rewards(
            self.functions,
            prompts,
            texts,
            columns,
            on_error=self.errors,
            timeout=self.timeout,
        )
        metrics = {}
        for name, values, failed in zip(scored.names, scored.per_function.T, scored.errors, strict=True):
            values = values[~np.isnan(values)]
            metrics[f"rewards/{name}/mean"] = values.mean() if values.size else np.nan
            metrics[f"rewards/{name}/std"] = values.std(ddof=1) if values.size > 1 else 0.0
            if self.errors == "ignore":
                metrics[f"rewards/{name}/errors"] = float(failed)
        return scored.per_function, metrics


def _id_lists(completions: Completions) -> list[list[int]]:
    ids, lengths = np.asarray(completions.ids), np.asarray(completions.mask).sum(-1)
    return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]


def load_host_rewards(
    model: LanguageModel,
    names: Sequence[str],
    *,
    errors: OnError = "raise",
    timeout: float | None = None,
) -> HostRewards:
    """Loads reward functions by name.

    Args:
        model: The policy.
        names: As `load_reward` takes them, or "reward_model:path/to/folder".
        errors: As in `HostRewards`.
        timeout: As in `HostRewards`.

    Raises:
        FileNotFoundError: If there is no such reward model.
        ValueError: If a name or its options are wrong.
    """
    return HostRewards(model, [_load_host(name, model) for name in names], errors, timeout)


def _load_host(name: str, model: LanguageModel) -> Callable:
    if not name.startswith(model_rewards.PREFIX):
        return load_reward(name)
    scorer = model_rewards.load_scorer(name.removeprefix(model_rewards.PREFIX))
    return model_rewards.RewardModelReward(scorer, model.tokenizer, model.eos_ids)


def reward_contexts(rewards: "HostRewards | TracedRewards") -> list[int]:
    """Lists how many tokens each reward model among the rewards reads."""
    functions = rewards.functions if isinstance(rewards, HostRewards) else getattr(rewards.reward, "functions", ())
    return [length for length in map(model_rewards.context_length, functions) if length is not None]


class TracedRewards(NamedTuple):
    """A traceable reward, called outside the iteration, as an evaluation does.

    Attributes:
        model: The policy.
        reward: A pytree that can be called, such as `JoinedReward`, or what `jax.tree_util.Partial` makes of a function.
    """

    model: LanguageModel
    reward: TraceableReward

    def __call__(
        self, table: PromptTable, indices: np.ndarray, completions: Completions
    ) -> tuple[Float[Array, "rows *functions"], Metrics]:
        """Scores the completions of some prompts."""
        columns = table.batch(indices, self.model.pad_id).columns
        times = completions.ids.shape[0] // len(indices)
        repeated = {name: jnp.repeat(values, times, axis=0) for name, values in columns.items()}
        return _call(self.reward, completions, repeated), {}


@jax.jit
def _call(reward: TraceableReward, completions: Completions, columns: Columns) -> Float[Array, "rows *functions"]:
    return reward(completions, columns)
