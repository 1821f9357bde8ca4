"""The inputs of trl_losses.json in closed form, and its rows.

Inputs are computed in float64 and rounded once: rounding inside sin and cos would by itself cost 5e-6.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

VOCAB = 7
GOLDEN = json.loads((pathlib.Path(__file__).parent / "trl_losses.json").read_text())
RTOL = 2e-6

DPO_LENGTHS = np.array([1, 5, 3, 6, 2, 2, 6, 4])
"""Tokens in the responses: rows 0 to 3 are chosen, 4 to 7 rejected; the prompts have 2."""
GRPO_LENGTHS = np.array([5, 3, 2, 4])
GRPO_PROMPT, GRPO_COMPLETION = 3, 5
GRPO_ADVANTAGES = np.array([1.2, -0.7, 0.4, -0.9])


def logits(rows: int, time: int, kind: str) -> np.ndarray:
    """Makes the logits of the `policy`, the `reference`, or the `old` policy, in float64."""
    row, step, entry = np.ogrid[:rows, :time, :VOCAB]
    angle = 1.3 * row + 0.7 * step + 0.5 * entry + 0.1 * row * entry
    if kind == "reference":
        return 2 * np.cos(0.9 * angle + 0.3)
    return 2 * np.sin(angle + (0.15 if kind == "old" else 0))


def tokens(rows: int, time: int) -> np.ndarray:
    row, step = np.ogrid[:rows, :time]
    return (3 * row + 2 * step + (step * step) % 5) % VOCAB


def log_probs(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Scores in float64, for the inputs that a loss takes as constants."""
    shifted = logits - logits.max(-1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return np.take_along_axis(log_softmax, tokens[..., None], -1)[..., 0]


def entropy(logits: np.ndarray) -> np.ndarray:
    """Computes the entropy of each position in float64, nats."""
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    probs = odds / odds.sum(-1, keepdims=True)
    return -(probs * np.log(probs)).sum(-1)


def mask(lengths: np.ndarray, time: int) -> jax.Array:
    return jnp.asarray(np.arange(time) < lengths[:, None])


def rounded(array: np.ndarray) -> jax.Array:
    """Rounds to the default precision: float32, or float64 under `jax.enable_x64`."""
    return jnp.asarray(array, jnp.result_type(float))


def norm(gradient: jax.Array) -> float:
    """Computes the Frobenius norm, without rounding."""
    return float(np.linalg.norm(np.asarray(gradient, np.float64)))
