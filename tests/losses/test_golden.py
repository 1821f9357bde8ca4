"""Losses and gradient norms of TRL's own code, see `tests/golden`. All in float32, to 2e-6."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.advantages import generalized_advantages
from jaxrl_llm.divergences import kl_estimate
from jaxrl_llm.log_probs import token_log_probs, token_statistics
from jaxrl_llm.losses import cross_entropy_loss, grpo_loss, ppo_loss, reward_model_loss
from jaxrl_llm.losses.group_relative import grpo_weights
from jaxrl_llm.reductions import masked_standardize
from tests.golden import fixture

close = functools.partial(np.testing.assert_allclose, rtol=fixture.RTOL)

# GRPO: the completion is the last part of each row, and a position predicts the token after it.

TOKENS = fixture.tokens(4, fixture.GRPO_PROMPT + fixture.GRPO_COMPLETION)
MASK = fixture.mask(fixture.GRPO_LENGTHS, fixture.GRPO_COMPLETION)
COMPLETION = slice(fixture.GRPO_PROMPT - 1, -1)


def scored(kind: str, temperature: float = 1.0) -> jax.Array:
    logits = fixture.logits(*TOKENS.shape, kind)[:, COMPLETION] / temperature
    return fixture.rounded(fixture.log_probs(logits, TOKENS[:, fixture.GRPO_PROMPT :]))


def grpo(loss_type, *, temperature=1.0, on_policy=False, kl=False, scale=1.0, **options):
    """Computes loss, metrics, and gradient with respect to the logits.

    Operation by operation: the loss of the fixture is a thirtieth of the sum of the sizes of its terms, so to 2e-6 it
    shows in which order a compiled program adds them up, and each release of XLA chooses that anew.
    """
    weights = grpo_weights(MASK, loss_type, max_completion_length=8)

    def loss(logits):
        tokens = jnp.asarray(TOKENS[:, fixture.GRPO_PROMPT :])
        statistics = token_statistics(logits[:, COMPLETION], tokens, temperature=temperature)
        return grpo_loss(
            statistics.log_probs,
            None if on_policy else scored("old", temperature),
            fixture.rounded(fixture.GRPO_ADVANTAGES),
            MASK,
            ref_log_probs=scored("reference") if kl else None,
            entropy=statistics.entropy,
            weights=jax.tree.map(lambda w: w * scale, weights),
            **options,
        )

    logits = fixture.rounded(fixture.logits(*TOKENS.shape, "policy"))
    return jax.value_and_grad(loss, has_aux=True)(logits)


GRPO_ROWS = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "grpo sequence(GSPO)": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "dapo sequence": {"loss_type": "dapo", "importance_sampling_level": "sequence"},
    "grpo sequence eps=.03": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.03},
    "grpo beta=0.04": {"loss_type": "grpo", "beta": 0.04, "kl": True},
    "dapo eps=.2 eps_high=.28": {"loss_type": "dapo", "epsilon_high": 0.28},
    "grpo eps=.05": {"loss_type": "grpo", "epsilon": 0.05},
    "grpo eps=.05 delta=1.1": {"loss_type": "grpo", "epsilon": 0.05, "delta": 1.1},
    "grpo temp=0.7": {"loss_type": "grpo", "temperature": 0.7},
    "grpo entropy_coef=0.01": {"loss_type": "grpo", "entropy_coef": 0.01},
    "dapo entropy_coef=0.01": {"loss_type": "dapo", "entropy_coef": 0.01},
    # Two accumulation steps: TRL divides grpo by their number, and dapo by the 28 tokens of both (14 are here).
    "grpo gas=2": {"loss_type": "grpo", "scale": 1 / 2},
    "dapo items=28 gas=2": {"loss_type": "dapo", "scale": 14 / 28},
}


@pytest.mark.parametrize("row", GRPO_ROWS)
def test_grpo_loss_and_gradient_equal_trl(row):
    (loss, _), grad = grpo(**GRPO_ROWS[row])
    expected_loss, expected_norm = fixture.GOLDEN["grpo"][row]
    close(loss, expected_loss)
    close(fixture.norm(grad), expected_norm)


def test_grpo_on_policy_equals_trl():
    (loss, _), grad = grpo("grpo", on_policy=True)
    expected_loss, expected_norm = fixture.GOLDEN["grpo"]["grpo on-policy(old=None)"]
    np.testing.assert_allclose(loss, expected_loss, atol=1e-7)  # Zero: the advantages of the fixture sum to zero.
    close(fixture.norm(grad), expected_norm)


@pytest.mark.parametrize(("row", "beta"), [("grpo_metrics(beta=0)", 0.0), ("grpo_metrics(beta=.04)", 0.04)])
def test_grpo_metrics_equal_trl(row, beta):
    (_, metrics), _ = grpo("grpo", beta=beta, kl=beta > 0)
    for name, expected in fixture.GOLDEN[row].items():
        close(metrics[name], expected, err_msg=name)


def test_the_log_probs_of_the_fixture_equal_trl():
    for name, kind in {"pol": "policy", "old": "old", "ref": "reference"}.items():
        logits = fixture.rounded(fixture.logits(*TOKENS.shape, kind)[:, COMPLETION])
        log_probs = token_log_probs(logits, jnp.asarray(TOKENS[:, fixture.GRPO_PROMPT :]))
        close(log_probs[0], fixture.GOLDEN["grpo_logps_row0"][name])


# PPO: from rewards to the loss. The fixture's rewards pay the score one step after the last token.

PPO_LENGTHS = np.array([3, 5, 2])
SCORES, SCORE_STEPS = np.array([1.0, -0.5, 0.25]), np.array([3, 4, 2])


@functools.partial(jax.jit, static_argnames=("estimator", "whiten"))
def ppo(estimator, whiten):
    base = np.arange(15.0).reshape(3, 5)
    mask, value_mask = fixture.mask(PPO_LENGTHS, 5), fixture.mask(PPO_LENGTHS + 1, 5)
    old, reference = -1.5 + 0.5 * np.sin(base), -1.5 + 0.5 * np.cos(base)
    old_values = fixture.rounded(0.3 * np.sin(0.7 * base + 0.2)) * value_mask
    kl = kl_estimate(fixture.rounded(old) * mask, fixture.rounded(reference) * mask, estimator)
    rewards = -0.05 * kl + fixture.rounded(SCORES[:, None] * (np.arange(5) == SCORE_STEPS[:, None]))
    if whiten:
        rewards = masked_standardize(rewards, value_mask, shift_mean=False)
    never = jnp.zeros((5, 3), bool)
    next_values = jnp.pad(old_values[:, 1:], ((0, 0), (0, 1)))
    advantages, returns = generalized_advantages(
        rewards.T, old_values.T, next_values.T, never, never, gamma=1.0, lam=0.95
    )
    advantages, returns = masked_standardize(advantages.T, mask), returns.T
    loss, metrics = ppo_loss(
        fixture.rounded(old + 0.3 * np.cos(base)),
        fixture.rounded(old),
        advantages,
        mask,
        values=fixture.rounded(0.3 * np.sin(0.7 * base + 0.2) + 0.4 * np.sin(base + 1)),
        old_values=old_values,
        returns=returns,
        value_mask=value_mask,
        cliprange_value=0.2,
        vf_coef=0.1,
    )
    return {
        "rewards": rewards,
        "advantages": advantages,
        "returns": returns,
        "pg_loss": metrics["loss/policy_avg"],
        "vf_loss": metrics["loss/value_avg"],
        "vf_clipfrac": metrics["val/clipfrac_avg"],
        "loss": loss,
    }


@pytest.mark.parametrize(
    ("row", "estimator", "whiten", "double"),
    [
        ("ppo_k1", "k1", False, False),
        ("ppo_k3", "k3", False, False),
        # Here the policy loss is 0.005, what remains of whitened advantages near 1: float32 has no digits to spare.
        ("ppo_k1_whiten_rewards", "k1", True, True),
    ],
)
def test_ppo_from_rewards_to_loss_equals_trl(row, estimator, whiten, double):
    with jax.enable_x64(double):
        values = ppo(estimator, whiten)
    for name, expected in fixture.GOLDEN[row].items():
        close(values[name], expected, err_msg=name)


# Supervised fine-tuning and reward modelling


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_cross_entropy_equals_trl(loss_type):
    expected = fixture.GOLDEN["sft (B2,T5) labels[0,:2]=labels[1,0]=labels[1,4]=-100"]
    learned = jnp.array([[0, 1, 1, 1], [1, 1, 1, 0]])
    logits = fixture.rounded(fixture.logits(2, 5, "policy")[:, :-1])
    log_probs = token_log_probs(logits, jnp.asarray(fixture.tokens(2, 5)[:, 1:]))
    loss, metrics = cross_entropy_loss(log_probs, learned, loss_type=loss_type)
    close(loss, expected[loss_type])
    close(metrics["nll"], expected["nll"])
    assert metrics["num_tokens"] == expected["n_valid"]


@pytest.mark.parametrize(
    ("row", "options"),
    [("bt", {}), ("bt+margin", {"margin": [0.5, 0, 1]}), ("bt+center .01", {"center_rewards_coefficient": 0.01})],
)
def test_reward_model_loss_equals_trl(row, options):
    options = {name: jnp.array(x) if isinstance(x, list) else x for name, x in options.items()}
    loss, _ = reward_model_loss(jnp.array([1.2, -0.3, 0.5]), jnp.array([0.7, 0.1, -1.0]), **options)
    close(loss, fixture.GOLDEN["reward rc=[1.2,-.3,.5] rr=[.7,.1,-1] margin=[.5,0,1]"][row])
