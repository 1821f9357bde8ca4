"""What `evaluate` measures: for each kind of rows, the figures of a model and some of the rows with theirs."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Shaped

from jaxrl_llm.data import (
    PreferenceExample,
    PromptExample,
    RatedExample,
    SupervisedExample,
    TokenizedRows,
    collate_preference,
    collate_sft,
    reward_columns,
    text_windows,
    tokenize_preference_rows,
    tokenize_prompt,
    tokenize_prompt_rows,
    tokenize_rated_rows,
    tokenize_sft_rows,
)
from jaxrl_llm.data.tokenizers import Tokenizer, encode_text
from jaxrl_llm.recipes.statistics import pass_at_k, pearson_correlation, wilson_interval
from jaxrl_llm.recipes.text import pairs, reward_model
from jaxrl_llm.recipes.text.language_model import LanguageModel, complete
from jaxrl_llm.recipes.text.prompts import plain_prompt
from jaxrl_llm.recipes.text.scoring import ResponseScores, in_batches, response_scores
from jaxrl_llm.rewards import Reward, evaluate_rewards
from jaxrl_llm.types import Key


class Measured(NamedTuple):
    """Figures over all rows, and the first rows one by one."""

    figures: dict[str, Any]
    samples: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Examiner:
    """A model, and how to run it.

    Attributes:
        model: A language model or a reward model.
        reference: A language model of the same vocabulary to compare with.
        max_length: Tokens after which a row is cut.
        batch_size: Rows that are scored together; it changes no score.
        chunk_size: Positions along time whose logits exist at once.
        num_samples: Rows to give back one by one.
    """

    model: LanguageModel
    reference: LanguageModel | None
    max_length: int
    batch_size: int
    chunk_size: int
    num_samples: int

    def scores(self, rows: Sequence[Any], length: Callable[[Any], int], collate: Callable[..., Any]) -> Any:
        """Scores all rows: `ResponseScores` where a batch is one `TokenBatch`, several of them where it is several."""
        model, reference = self.model, self.reference
        score = partial(
            response_scores,
            model.module,
            model.params,
            ref_module=None if reference is None else reference.module,
            ref_params=None if reference is None else reference.params,
            chunk_size=self.chunk_size,
        )
        return in_batches(
            score,
            rows,
            length,
            lambda rows, length: collate(rows, pad_id=model.pad_id, length=length),
            batch_size=self.batch_size,
        )


def measure_texts(examiner: Examiner, texts: Sequence[str]) -> Measured:
    """Measures how well a language model predicts whole texts, each by itself.

    A text stands between a token of beginning (BOS where the tokenizer writes one, else EOS) and EOS. Longer ones are cut
    into windows, so that every token counts once.

    Returns:
        `loss` (nats for each token), `perplexity`, `bits_per_byte` (of UTF-8) and `mean_token_accuracy`.
    """
    tokenizer = examiner.model.tokenizer
    streams = [_stream(text, tokenizer) for text in texts]
    windows = [text_windows(stream, examiner.max_length) for stream in streams]
    rows = [window for text in windows for window in text]
    of_text = np.repeat(np.arange(len(texts)), [len(text) for text in windows])
    scores = examiner.scores(rows, lambda row: len(row.ids), collate_sft)
    scores = jax.tree.map(lambda x: np.bincount(of_text, weights=x, minlength=len(texts)), scores)
    num_bytes = sum(len(text.encode()) for text in texts)
    figures = {"rows": len(texts), **_likelihood(examiner, scores)}
    figures["bits_per_byte"] = -float(scores.log_probs.sum()) / num_bytes / math.log(2)
    losses = -scores.log_probs / scores.tokens
    return Measured(figures, [{"text": texts[i], "loss": float(losses[i])} for i in _first(examiner, texts)])


def measure_completions(examiner: Examiner, examples: Sequence[SupervisedExample]) -> Measured:
    """Measures how well a language model predicts given completions.

    Returns:
        `loss` (nats for each token of the completions), `perplexity` and `mean_token_accuracy`.
    """
    tokens = tokenize_sft_rows(examples, examiner.model.tokenizer, max_length=examiner.max_length)
    scores = examiner.scores(tokens.rows, lambda row: len(row.ids), collate_sft)
    losses = -scores.log_probs / scores.tokens
    texts = [examiner.model.tokenizer.decode(row.ids) for row in tokens.rows[: examiner.num_samples]]
    samples = [{"text": text, "loss": float(loss)} for text, loss in zip(texts, losses, strict=False)]
    return Measured(_counts(tokens) | _likelihood(examiner, scores), samples)


def measure_pairs(examiner: Examiner, examples: Sequence[PreferenceExample]) -> Measured:
    """Measures how often a language model finds the chosen response more likely than the rejected one.

    Returns:
        `accuracy` by the log-probabilities summed over responses and `accuracy_averaged` by those averaged over their
        tokens; with a reference `rewards/accuracies` and `rewards/margins` by the log-ratios (the rewards of DPO at
        beta 1) and `kl`. Shares have `_low` and `_high`, the ends of their 95 % intervals.
    """
    tokens = tokenize_preference_rows(examples, examiner.model.tokenizer, max_length=examiner.max_length)
    chosen, rejected = examiner.scores(tokens.rows, pairs.row_length, collate_preference)
    sums = chosen.log_probs, rejected.log_probs
    means = [scores.log_probs / scores.tokens for scores in (chosen, rejected)]
    figures = _counts(tokens) | _share("accuracy", sums[0] > sums[1]) | _share("accuracy_averaged", means[0] > means[1])
    figures |= {"logps/chosen": _mean(sums[0]), "logps/rejected": _mean(sums[1])}
    if examiner.reference is not None:
        margins = (sums[0] - chosen.ref_log_probs) - (sums[1] - rejected.ref_log_probs)
        figures |= _share("rewards/accuracies", margins > 0) | {"rewards/margins": _mean(margins)}
        figures["kl"] = _mean(np.concatenate([chosen.kl, rejected.kl]))
    return Measured(figures, _pair_samples(examiner, tokens.rows, *sums, name="log-prob"))


def measure_reward_pairs(examiner: Examiner, examples: Sequence[PreferenceExample]) -> Measured:
    """Measures how often a reward model gives the chosen response the higher reward.

    Returns:
        `accuracy` with its 95 % interval `accuracy_low` and `accuracy_high`, `margin` and `mean_reward`.
    """
    tokens = tokenize_preference_rows(examples, examiner.model.tokenizer, max_length=examiner.max_length)
    chosen, rejected = _rewards(examiner, reward_model.PAIRS, tokens.rows)
    figures = _counts(tokens) | _share("accuracy", chosen > rejected)
    figures |= {"margin": _mean(chosen - rejected), "mean_reward": _mean(np.concatenate([chosen, rejected]))}
    return Measured(figures, _pair_samples(examiner, tokens.rows, chosen, rejected, name="reward"))


def measure_ratings(examiner: Examiner, examples: Sequence[RatedExample]) -> Measured:
    """Measures how near the rewards of a reward model are to ratings.

    Returns:
        `mse`, `mae`, `pearson` (their correlation) and `mean_reward`.
    """
    tokens = tokenize_rated_rows(examples, examiner.model.tokenizer, max_length=examiner.max_length)
    rewards = _rewards(examiner, reward_model.RATINGS, tokens.rows)
    scores = np.array([row.score for row in tokens.rows])
    figures = {"mse": _mean((rewards - scores) ** 2), "mae": _mean(np.abs(rewards - scores))}
    figures |= {"pearson": pearson_correlation(rewards, scores), "mean_reward": _mean(rewards)}
    samples = [
        {"text": _decode(examiner, row.prompt_ids, row.completion_ids), "score": row.score, "reward": float(reward)}
        for row, reward in zip(tokens.rows[: examiner.num_samples], rewards, strict=False)
    ]
    return Measured(_counts(tokens) | figures, samples)


def measure_generations(
    examiner: Examiner,
    questions: Sequence[PromptExample],
    functions: Sequence[Reward],
    key: Key,
    *,
    num_generations: int,
    max_completion_length: int,
    temperature: float,
    top_p: float,
    reward_threshold: float,
) -> Measured:
    """Completes prompts and asks reward functions which completions are right.

    Prompts that leave no room for `max_completion_length` tokens are left out and counted.

    Returns:
        The mean of each function, and `pass@1` … `pass@k`.

    Raises:
        ValueError: If no prompt is left, or no function applies to a completion.
    """
    model = examiner.model
    room = model.context_length - max_completion_length + 1
    prompts = tokenize_prompt_rows(questions, model.tokenizer, max_prompt_length=room)
    kept = [questions[i] for i in prompts.kept for _ in range(num_generations)]
    texts = complete(
        model,
        model.params,
        [ids for ids in prompts.rows for _ in range(num_generations)],
        key,
        max_new_tokens=max_completion_length,
        temperature=temperature,
        top_p=top_p,
        batch_size=examiner.batch_size,
    )
    asked = [plain_prompt(question.prompt) for question in kept]
    answers = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(asked, texts, strict=True)
    ]
    columns = reward_columns(kept)
    rewards = evaluate_rewards(functions, asked, answers, columns)
    if np.isnan(rewards.total).any():
        row = int(np.isnan(rewards.total).argmax()) // num_generations
        raise ValueError(f"No reward function applies to the completions of prompt {row + 1}, {texts[row]!r:.60}.")
    right = (rewards.total >= reward_threshold).reshape(-1, num_generations)
    figures: dict[str, Any] = {"prompts": len(prompts.rows), "prompts_dropped": prompts.num_dropped}
    for name, values in zip(rewards.names, rewards.per_function.T, strict=True):
        figures[name] = float(np.nanmean(values, dtype=np.float64))
    num_right = right.sum(1).tolist()
    figures |= {f"pass@{k}": pass_at_k(num_right, num_generations, k) for k in range(1, num_generations + 1)}
    samples = [
        {"prompt": model.tokenizer.decode(prompts.rows[i // num_generations]), "completion": texts[i]}
        | ({"answer": columns["answer"][i]} if "answer" in columns else {})
        | {"reward": float(rewards.total[i])}
        for i in _first(examiner, texts)
    ]
    return Measured(figures, samples)


def _stream(text: str, tokenizer: Tokenizer) -> list[int]:
    beginning = tokenize_prompt("", tokenizer).tolist() or [tokenizer.eos_token_id]
    return [*beginning, *encode_text(text, tokenizer), tokenizer.eos_token_id]


def _rewards(examiner: Examiner, source: reward_model.Source, rows: Sequence[Any]) -> Any:
    return reward_model.rewards_of(examiner.model, examiner.model.params, source, rows, batch_size=examiner.batch_size)


def _counts(tokens: TokenizedRows) -> dict[str, int]:
    return {"rows": len(tokens.rows), "rows_truncated": tokens.num_truncated, "rows_dropped": tokens.num_dropped}


def _mean(values: Shaped[np.ndarray, " rows"]) -> float:
    return float(np.mean(values, dtype=np.float64))


def _share(name: str, right: Bool[np.ndarray, " rows"]) -> dict[str, float]:
    """A share with the ends of its 95 % interval."""
    low, high = wilson_interval(int(right.sum()), len(right))
    return {name: _mean(right), f"{name}_low": low, f"{name}_high": high}


def _likelihood(examiner: Examiner, scores: ResponseScores) -> dict[str, Any]:
    totals = jax.tree.map(lambda x: float(x.sum(dtype=np.float64)), scores)
    loss = -totals.log_probs / totals.tokens
    with np.errstate(over="ignore"):  # a model that is far off has no perplexity that could be written
        perplexity = float(np.exp(loss))
    figures = {"tokens": round(totals.tokens), "loss": loss, "perplexity": perplexity}
    figures["mean_token_accuracy"] = totals.right / totals.tokens
    if examiner.reference is not None:
        figures |= {"ref_loss": -totals.ref_log_probs / totals.tokens, "kl": totals.kl / len(scores.tokens)}
    return figures


def _first(examiner: Examiner, rows: Sequence[Any]) -> range:
    return range(min(examiner.num_samples, len(rows)))


def _decode(examiner: Examiner, *parts: np.ndarray) -> str:
    return examiner.model.tokenizer.decode(np.concatenate(parts), skip_special_tokens=True)


def _pair_samples(
    examiner: Examiner, rows: Sequence[Any], chosen: np.ndarray, rejected: np.ndarray, *, name: str
) -> list[dict[str, Any]]:
    return [
        {
            "prompt": _decode(examiner, rows[i].prompt_ids),
            "chosen": _decode(examiner, rows[i].chosen_ids),
            f"{name} of chosen": float(chosen[i]),
            "rejected": _decode(examiner, rows[i].rejected_ids),
            f"{name} of rejected": float(rejected[i]),
        }
        for i in _first(examiner, rows)
    ]
