"""Rewards on token ids, in jax: with one of these, a whole GRPO iteration is a single jitted function."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped


def exact_match_tokens(
    completion_ids: Int[Array, "rows time"],
    completion_mask: Shaped[Array, "rows time"],
    answer_ids: Int[Array, "rows answer"],
    answer_mask: Shaped[Array, "rows answer"],
    eos_id: int | Int[Array, "*eos"],
) -> Float[Array, " rows"]:
    """Rewards 1 where a completion, up to its first EOS, is the answer token by token, else 0.

    Args:
        completion_ids: As the sampler gives them, padded on the right.
        completion_mask: Nonzero on the tokens of the completion (EOS may be among them or not).
        answer_ids: The right answers without EOS, padded on the right; one for each completion.
        answer_mask: Nonzero on the tokens of the answer.
        eos_id: The id that ends a completion, or several.

    Example:
        >>> ids, answers = jnp.array([[1, 2, 9, 0], [1, 2, 3, 9]]), jnp.array([[1, 2], [1, 2]])
        >>> exact_match_tokens(ids, jnp.ones_like(ids), answers, jnp.ones_like(answers), eos_id=9).tolist()
        [1.0, 0.0]
    """
    ended = jnp.cumsum(jnp.isin(completion_ids, jnp.asarray(eos_id)), axis=1) > 0
    content_mask = (completion_mask != 0) & ~ended
    width = max(completion_ids.shape[1], answer_ids.shape[1])
    got, got_mask = _padded(completion_ids, width), _padded(content_mask, width)
    right, right_mask = _padded(answer_ids, width), _padded(answer_mask != 0, width)
    same = (got_mask == right_mask) & ((got == right) | ~right_mask)
    return jnp.all(same, axis=1).astype(jnp.float32)


def _padded(values: Shaped[Array, "rows time"], width: int) -> Shaped[Array, "rows width"]:
    return jnp.pad(values, ((0, 0), (0, width - values.shape[1])))
