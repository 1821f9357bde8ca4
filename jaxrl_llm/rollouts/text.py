"""Sampling text: prefill once, then one token at a time with a key-value cache, all in one program."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.log_probs import token_log_probs
from jaxrl_llm.rollouts.sampling import (
    filter_logits,
    is_off,
    left_pad,
    most_likely_tokens,
    penalize_repetition,
    sample_tokens,
)
from jaxrl_llm.rollouts.scoring import Apply
from jaxrl_llm.types import Key, KVCache, Mask, Numeric, Params


class Completions(NamedTuple):
    """Sampled text; completions of one prompt are contiguous.

    Attributes:
        ids: Sampled tokens, `pad_id` after the end.
        mask: True up to and including the first EOS.
        log_probs: Log-probability, nats, of each token under the temperature-scaled, unfiltered distribution: what a
            trainer scores. 0 where masked. (At temperature 0: of the unscaled distribution.)
        sampling_log_probs: Log-probability of each token under the distribution that was really sampled, after the
            repetition penalty and the filters: for importance correction. 0 where masked, and at temperature 0.
    """

    ids: Int[Array, "rows time"]
    mask: Bool[Array, "rows time"]
    log_probs: Float[Array, "rows time"]
    sampling_log_probs: Float[Array, "rows time"]


class _Decoding(NamedTuple):
    """State of the loop: `alive` rows have not ended, `token` is the last one of each row."""

    step: Array
    token: Array
    alive: Array
    cache: KVCache
    completions: Completions


def generate(
    apply: Apply,
    params: Params,
    key: Key,
    prompt_ids: Int[Array, "batch prompt_time"],
    prompt_mask: Mask,
    *,
    max_new_tokens: int,
    num_generations: int = 1,
    temperature: Numeric = 1.0,
    top_k: int = 0,
    top_p: Numeric = 1.0,
    min_p: Numeric = 0.0,
    repetition_penalty: Numeric = 1.0,
    eos_id: int | Sequence[int] | None = None,
    pad_id: int = 0,
    first_row: Numeric = 0,
) -> Completions:
    """Samples completions of prompts; pure, to be jitted by the caller.

    Each prompt is read once, whatever `num_generations`; the loop ends as soon as every row has. Token t of row i is
    drawn with a key made from (key, i, t), so a row does not depend on what its neighbours say.

    Args:
        apply: The model, such as `module.apply`.
        params: Parameters of the model.
        key: Key of the sampling; it is consumed.
        prompt_ids: Prompts, padded on either side. Each has at least one token.
        prompt_mask: Nonzero for real tokens.
        max_new_tokens: Length of the completions at most. Static.
        num_generations: Completions for each prompt. Static.
        temperature: Divides the logits; 0 is greedy. May be traced.
        top_k: Sample from the k most likely tokens only; 0: from all. Static.
        top_p: Sample from the most likely tokens that together have probability p.
        min_p: Sample from tokens at least min_p times as likely as the most likely one.
        repetition_penalty: Above 1, makes tokens of the prompt and of the completion so far less likely.
        eos_id: The token, or tokens, that end a completion; None: each runs to `max_new_tokens`. Static.
        pad_id: Fills `ids` after the end.
        first_row: Number of the first completion among all: a batch that is sampled in parts gives the same samples.

    Returns:
        `Completions` with batch × num_generations rows.

    Raises:
        ValueError: If a setting is out of range, or if the shapes of the prompts do not fit.
    """
    _check(max_new_tokens, num_generations, temperature, top_k, top_p, min_p, repetition_penalty)
    prompt_ids, prompt_real = left_pad(prompt_ids.astype(jnp.int32), prompt_mask)
    with jax.named_scope("prefill"):
        cache = _prefill(apply, params, prompt_ids, prompt_real, max_new_tokens)
    cache, prompt_ids, prompt_real = _repeat(cache, prompt_ids, prompt_real, num_generations)
    rows = prompt_ids.shape[0]
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first_row + jnp.arange(rows))
    eos_ids = jnp.asarray([] if eos_id is None else eos_id, jnp.int32).reshape(-1)
    greedy = jnp.asarray(temperature) == 0
    unfiltered = top_k == 0 and is_off(top_p, 1.0) and is_off(min_p, 0.0) and is_off(repetition_penalty, 1.0)
    scale = jnp.where(greedy, 1, temperature)

    def choose(logits: Array, decoding: _Decoding) -> tuple[Array, Array, Array]:
        """Draws the next token of each row; returns it with its log-probability, and that under what was sampled from."""
        plain = logits
        if not is_off(repetition_penalty, 1.0):
            history = jnp.concatenate([prompt_ids, decoding.completions.ids], axis=1)
            history_mask = jnp.concatenate([prompt_real, decoding.completions.mask], axis=1)
            logits = penalize_repetition(logits, history, history_mask, repetition_penalty)
        allowed = filter_logits(logits / scale, top_k=top_k, top_p=top_p, min_p=min_p)
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, decoding.step)
        sampled, sampled_log_probs = sample_tokens(keys, allowed)
        token = jnp.where(greedy, most_likely_tokens(logits), sampled).astype(jnp.int32)
        log_probs = token_log_probs(plain, token, temperature=scale)
        if unfiltered:  # all but greedy tokens were drawn from the model's own distribution
            log_probs = jnp.where(greedy, log_probs, sampled_log_probs)
        return token, log_probs, jnp.where(greedy, 0, sampled_log_probs)

    def body(decoding: _Decoding) -> _Decoding:
        alive = decoding.alive
        logits, cache = apply({"params": params}, decoding.token[:, None], mask=alive[:, None], cache=decoding.cache)
        logits = logits[:, 0].astype(jnp.float32)
        token, log_probs, sampling_log_probs = choose(logits, decoding)
        new = Completions(
            ids=jnp.where(alive, token, pad_id),
            mask=alive,
            log_probs=jnp.where(alive, log_probs, 0),
            sampling_log_probs=jnp.where(alive, sampling_log_probs, 0),
        )
        completions = jax.tree.map(
            lambda buffer, column: buffer.at[:, decoding.step].set(column.astype(buffer.dtype)),
            decoding.completions,
            new,
        )
        alive &= ~jnp.isin(token, eos_ids)
        return _Decoding(decoding.step + 1, token, alive, cache, completions)

    shape = (rows, max_new_tokens)
    empty = Completions(
        ids=jnp.full(shape, pad_id, jnp.int32),
        mask=jnp.zeros(shape, bool),
        log_probs=jnp.zeros(shape, jnp.float32),
        sampling_log_probs=jnp.zeros(shape, jnp.float32),
    )
    start = _Decoding(jnp.int32(0), prompt_ids[:, -1], jnp.ones(rows, bool), cache, empty)
    with jax.named_scope("decode"):
        end = jax.lax.while_loop(lambda d: (d.step < max_new_tokens) & d.alive.any(), body, start)
    return end.completions


def _prefill(apply: Apply, params: Params, ids: Array, real: Array, max_new_tokens: int) -> KVCache:
    """Reads all but the last token of each prompt, which the loop reads first."""
    if ids.shape[1] == 1:  # nothing to read: a masked token makes the cache, and the loop writes over it
        cache = apply({"params": params}, ids, mask=jnp.zeros_like(real), cache=max_new_tokens, output="hidden")[1]
        return cache._replace(length=jnp.zeros_like(cache.length))
    slots = ids.shape[1] - 1 + max_new_tokens
    return apply({"params": params}, ids[:, :-1], mask=real[:, :-1], cache=slots, output="hidden")[1]


def _repeat(cache: KVCache, ids: Array, real: Array, times: int) -> tuple[KVCache, Array, Array]:
    """Repeats each row of the cache and of the prompts, so that completions of one prompt are contiguous."""
    if times == 1:
        return cache, ids, real
    cache = cache._replace(
        keys=jnp.repeat(cache.keys, times, axis=1),
        values=jnp.repeat(cache.values, times, axis=1),
        mask=jnp.repeat(cache.mask, times, axis=0),
    )
    return cache, jnp.repeat(ids, times, axis=0), jnp.repeat(real, times, axis=0)


def _check(
    max_new_tokens: int,
    num_generations: int,
    temperature: Numeric,
    top_k: int,
    top_p: Numeric,
    min_p: Numeric,
    repetition_penalty: Numeric,
) -> None:
    """Refuses settings out of range, where they are Python numbers."""
    ranges: dict[str, tuple[Numeric, bool, str]] = {
        "max_new_tokens": (max_new_tokens, max_new_tokens >= 1, "at least 1"),
        "num_generations": (num_generations, num_generations >= 1, "at least 1"),
        "top_k": (top_k, top_k >= 0, "at least 0 (0 keeps all tokens)"),
    }
    if isinstance(temperature, int | float):
        ranges["temperature"] = (temperature, temperature >= 0, "at least 0 (0 is greedy)")
    if isinstance(top_p, int | float):
        ranges["top_p"] = (top_p, 0 < top_p <= 1, "in (0, 1]")
    if isinstance(min_p, int | float):
        ranges["min_p"] = (min_p, 0 <= min_p <= 1, "in [0, 1]")
    if isinstance(repetition_penalty, int | float):
        ranges["repetition_penalty"] = (repetition_penalty, repetition_penalty > 0, "positive (1 changes nothing)")
    for name, (value, ok, meaning) in ranges.items():
        if not ok:
            raise ValueError(f"{name} must be {meaning}, got {value}.")
