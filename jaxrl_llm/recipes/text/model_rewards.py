"""Rewards that a saved reward model gives: on the host by name, and traced, inside the program of an iteration.

    --reward-funcs reward_model:runs/reward/model

The prompt with its completion is read as one text and scored where `text_rewards` says. Where both models have the same
tokens, the sampled ids themselves are scored, with the EOS if one was sampled; else the text is tokenized anew, and gets
an EOS only if the completion had ended.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxrl_llm.data import Message, RatedExample, RatedTokens, TokenBatch, collate_rated, tokenize_rated_rows
from jaxrl_llm.data.tokenizers import Tokenizer
from jaxrl_llm.models import ScalarHead, from_pretrained_reward_model
from jaxrl_llm.recipes.text.language_model import LanguageModel, require_room
from jaxrl_llm.recipes.text.scoring import in_batches, text_rewards
from jaxrl_llm.rewards.text import completion_text
from jaxrl_llm.types import Params

PREFIX = "reward_model:"
"""What the name of such a reward begins with; the folder follows."""


def load_scorer(path: str) -> LanguageModel:
    """Loads a saved reward model with its tokenizer.

    Args:
        path: Folder, as the recipe `reward-model` or transformers saves it (`…ForSequenceClassification`).

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it holds no reward model, or no tokenizer.
    """
    module, params, tokenizer = from_pretrained_reward_model(path)
    if tokenizer is None:
        raise ValueError(f"The reward model in {path} has no tokenizer files; save them into the same folder.")
    return LanguageModel(module, params, tokenizer)


def context_length(function: Callable[..., Any]) -> int | None:
    """Tells how many tokens the reward model behind a reward function reads; None for any other function."""
    if isinstance(function, RewardModelReward):
        return function.scorer.context_length
    if isinstance(function, TokenReward):
        return function.module.backbone.config.context_length
    return None


def same_tokens(left: Tokenizer, right: Tokenizer) -> bool:
    """Tells whether ids of one tokenizer mean the same to the other."""
    return left.eos_token_id == right.eos_token_id and left.get_vocab() == right.get_vocab()


def reward_model_scores(
    module: ScalarHead,
    params: Params,
    prompt_ids: Int[Array, "rows prompt_time"],
    prompt_mask: Shaped[Array, "rows prompt_time"],
    completion_ids: Int[Array, "rows time"],
    completion_mask: Shaped[Array, "rows time"],
) -> Float[Array, " rows"]:
    """Scores prompts, padded on the left, with their completions, padded on the right. Pure, and may be traced.

    Args:
        module: The reward model; its tokens are those of the ids.
        params: Its parameters.
        prompt_ids: Prompts.
        prompt_mask: Nonzero on their tokens.
        completion_ids: Completions as they were sampled, with EOS.
        completion_mask: Nonzero on their tokens, EOS among them.
    """
    tokens = jnp.concatenate([prompt_ids, completion_ids], axis=1)
    mask = jnp.concatenate([prompt_mask != 0, completion_mask != 0], axis=1)
    return jax.lax.stop_gradient(text_rewards(module, params, TokenBatch(tokens, mask, mask)))  # pyright: ignore


@partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["module"])
@dataclasses.dataclass(frozen=True)
class TokenReward:
    """A traceable reward of token ids, and a pytree: its parameters can be an argument of a compiled program.

    Attributes:
        module: The reward model, with the tokens of the policy.
        params: Its parameters.
    """

    module: ScalarHead
    params: Params

    def __call__(
        self, prompt_ids: Array, prompt_mask: Array, completion_ids: Array, completion_mask: Array
    ) -> Float[Array, " rows"]:
        """Scores prompts with their completions, see `reward_model_scores`."""
        return reward_model_scores(self.module, self.params, prompt_ids, prompt_mask, completion_ids, completion_mask)


def load_token_reward(path: str, tokenizer: Tokenizer | None) -> TokenReward:
    """Loads a reward model as `reward(prompt_ids, prompt_mask, completion_ids, completion_mask)`, traceable.

    Args:
        path: As in `load_scorer`.
        tokenizer: That of the policy.

    Raises:
        FileNotFoundError: As `load_scorer`.
        ValueError: As `load_scorer`; and if the policy has other tokens.
    """
    module, params, own = load_scorer(path)
    if tokenizer is None or not same_tokens(tokenizer, own):
        raise ValueError(
            f"The reward model in {path} has other tokens than the policy (or tokenizer was not given), so that it cannot "
            "score its ids. Do without traceable_rewards: then the text is tokenized anew."
        )
    assert isinstance(module, ScalarHead)
    return TokenReward(module, params)


@dataclasses.dataclass(frozen=True)
class RewardModelReward:
    """A reward on the host, `reward(prompts, completions, prompt_ids, completion_ids) -> list[float | None]`.

    Attributes:
        scorer: The reward model.
        tokenizer: That of the policy, whose ids come.
        eos_ids: The tokens that end its completions.
        batch_size: Texts that are scored together.
    """

    scorer: LanguageModel
    tokenizer: Tokenizer
    eos_ids: tuple[int, ...]
    batch_size: int = 32

    @property
    def __name__(self) -> str:
        return "reward_model"

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        **columns: Any,
    ) -> list[float | None]:
        """Scores the completions; None for one of which no token is left when it is tokenized anew."""
        if same_tokens(self.tokenizer, self.scorer.tokenizer):
            pairs = zip(prompt_ids, completion_ids, strict=True)
            rows = [RatedTokens(_array(prompt), _array(completion), 0.0, False) for prompt, completion in pairs]
            return self._scores(rows)
        examples = [_example(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        tokenized = tokenize_rated_rows(examples, self.scorer.tokenizer)
        ended = [len(ids) > 0 and ids[-1] in self.eos_ids for ids in completion_ids]
        rows = [row if ended[i] else self._cut(row) for row, i in zip(tokenized.rows, tokenized.kept, strict=True)]
        rewards: list[float | None] = [None] * len(examples)
        for index, reward in zip(tokenized.kept, self._scores(rows), strict=True):
            rewards[index] = reward
        return rewards

    def _scores(self, rows: list[RatedTokens]) -> list[float | None]:
        lengths = [len(row.prompt_ids) + len(row.completion_ids) for row in rows]
        require_room(self.scorer, max(lengths), "the reward model cannot read prompt and completion; shorten them")
        pad_id, limit = self.scorer.pad_id, self.scorer.context_length
        return in_batches(
            partial(_text_rewards, self.scorer.module, self.scorer.params),
            rows,
            lambda row: len(row.prompt_ids) + len(row.completion_ids),
            lambda rows, length: collate_rated(rows, pad_id=pad_id, length=length).texts,
            batch_size=self.batch_size,
            max_length=limit,
        ).tolist()

    def _cut(self, row: RatedTokens) -> RatedTokens:
        """Takes the EOS away that the template put behind a completion that had none."""
        has_eos = len(row.completion_ids) > 0 and row.completion_ids[-1] == self.scorer.tokenizer.eos_token_id
        return row._replace(completion_ids=row.completion_ids[:-1]) if has_eos else row


_text_rewards = partial(jax.jit, static_argnames="module")(text_rewards)


def _array(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, np.int32)


def _example(prompt: Any, completion: Any) -> RatedExample:
    if isinstance(prompt, str):
        return RatedExample(prompt, completion_text(completion), 0.0)
    turns = tuple(Message(turn["role"], turn["content"]) for turn in prompt)
    return RatedExample(turns, (Message("assistant", completion_text(completion)),), 0.0)
