"""What models think of given texts: numbers for each row, in batches of few shapes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrl_llm.data import TokenBatch, bucket_length
from jaxrl_llm.divergences import chunked_generalized_jsd
from jaxrl_llm.log_probs import chunked_token_statistics
from jaxrl_llm.losses import sequence_log_probs
from jaxrl_llm.models import Decoder, ScalarHead, head_kernel, last_token_values
from jaxrl_llm.training.parallel import whole
from jaxrl_llm.types import Key, Params

T = TypeVar("T")


class ResponseScores(NamedTuple):
    """Sums over the targets of each row.

    Attributes:
        tokens: Number of targets.
        log_probs: Log-probability of the response, nats.
        right: Targets that are the most likely token.
        ref_log_probs: Log-probability under the reference; 0 without one.
        kl: KL divergence of the next-token distributions from those of the reference, nats; 0 without one.
    """

    tokens: Float[Array, " batch"]
    log_probs: Float[Array, " batch"]
    right: Float[Array, " batch"]
    ref_log_probs: Float[Array, " batch"]
    kl: Float[Array, " batch"]


@partial(jax.jit, static_argnames=("module", "ref_module", "chunk_size"))
def response_scores(
    module: Decoder,
    params: Params,
    batch: TokenBatch,
    *,
    ref_module: Decoder | None = None,
    ref_params: Params | None = None,
    chunk_size: int = 128,
) -> ResponseScores:
    """Scores responses under a language model and, if there is one, under a reference.

    Args:
        module: The model.
        params: Its parameters.
        batch: Rows; `loss_mask` marks the responses.
        ref_module: Another model with the same vocabulary.
        ref_params: Its parameters.
        chunk_size: Positions along time whose logits exist at once.
    """
    tokens, mask, learned = map(jnp.asarray, (batch.tokens, batch.mask, batch.loss_mask[:, 1:]))

    def states(module: Decoder, params: Params) -> tuple[Array, Array]:
        hidden, _ = module.apply({"params": params}, tokens[:, :-1], mask=mask[:, :-1], output="hidden")
        return hidden, head_kernel(params)

    def total(values: Array) -> Array:
        return sequence_log_probs(values.astype(jnp.float32), learned)

    own = states(module, params)
    statistics = chunked_token_statistics(*own, tokens[:, 1:], chunk_size=chunk_size)
    ref_log_probs = kl = jnp.zeros(len(tokens))
    if ref_module is not None:
        other = states(ref_module, ref_params)
        ref_log_probs = total(chunked_token_statistics(*other, tokens[:, 1:], chunk_size=chunk_size).log_probs)
        kl = total(chunked_generalized_jsd(*own, *other, beta=1.0, chunk_size=chunk_size))
    right = total(statistics.is_argmax)
    return ResponseScores(total(learned), total(statistics.log_probs), right, ref_log_probs, kl)


def text_rewards(
    module: ScalarHead, params: Params, texts: TokenBatch, dropout_key: Key | None = None
) -> Float[Array, " batch"]:
    """Computes the reward of each text: the score at its last token that is not the config's `pad_token_id`.

    So does transformers, which knows no masks there. Where the tokenizer has a padding token, that is the EOS; where EOS
    serves as padding (GPT-2), it is the token before.

    Args:
        module: The reward model.
        params: Its parameters.
        texts: Rows, padded on the right.
        dropout_key: Turns dropout on.
    """
    options = {} if dropout_key is None else {"deterministic": False, "rngs": {"dropout": dropout_key}}
    tokens, mask = jnp.asarray(texts.tokens), jnp.asarray(texts.mask)
    values, _ = module.apply({"params": params}, tokens, mask=mask, **options)
    pad_id = module.backbone.config.pad_token_id
    return last_token_values(values, mask if pad_id is None else mask & (tokens != pad_id))


def in_batches(
    score: Callable[[TokenBatch], Any],
    rows: Sequence[T],
    length: Callable[[T], int],
    collate: Callable[[Sequence[T], int], Any],
    *,
    batch_size: int,
    max_length: int | None = None,
) -> Any:
    """Scores all rows, those of like length together, and gives the scores back in the order of the rows.

    Args:
        score: `score(texts) -> tree` of arrays [batch, …], for each `TokenBatch` of a batch.
        rows: At least one.
        length: Tokens of a row.
        collate: `collate(rows, length) -> batch`, a `TokenBatch` or a tuple of several.
        batch_size: Rows of a batch; the last one is filled up with rows whose scores are thrown away.
        max_length: Tokens that a batch is padded to at most; None: those of the longest row. Give it where rows come again
            and again, so that their shapes stay few.

    Returns:
        The tree with numpy arrays [rows, …]; a tuple of trees where a batch is a tuple.
    """
    lengths = np.array([length(row) for row in rows])
    order = np.argsort(lengths, kind="stable")
    size, longest = min(batch_size, len(rows)), int(lengths.max()) if max_length is None else max_length
    parts = []
    for start in range(0, len(rows), size):
        indices = np.resize(order[start : start + size], size)
        width = bucket_length(int(lengths[indices].max()), max_length=longest)
        batch = collate([rows[i] for i in indices.tolist()], width)
        scores = jax.tree.map(score, batch, is_leaf=lambda x: isinstance(x, TokenBatch))
        parts.append(jax.device_get(whole(scores)))
    places = np.argsort(order)
    return jax.tree.map(lambda *x: np.concatenate(x)[places], *parts)
