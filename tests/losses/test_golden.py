"""Losses and gradient norms of TRL's own code, see `tests/golden`. All in float32, to 2e-6."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.log_probs import token_log_probs, token_statistics
from jaxrl_llm.losses import cross_entropy_loss, grpo_loss, ppo_loss, reward_model_loss, rloo_loss, top_entropy_mask
from jaxrl_llm.losses.group_relative import grpo_weights
from jaxrl_llm.reductions import loss_weights, masked_standardize
from jaxrl_llm.rewards import response_advantages, token_rewards
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
    kept = None
    if share := options.pop("top_entropy_share", None):
        entropy = fixture.rounded(fixture.entropy(fixture.logits(*TOKENS.shape, "policy")[:, COMPLETION]))
        kept = options["entropy_mask"] = top_entropy_mask(entropy, MASK, share)
    weights = grpo_weights(fixture.rounded(MASK), loss_type, max_completion_length=8, entropy_mask=kept)

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
            loss_type=loss_type,
            max_completion_length=8,
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
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "vespo": {"loss_type": "vespo"},
    "luspo (sequence)": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "gmpo eps=.4": {"loss_type": "gmpo", "epsilon": 0.4},
    "gmpo eps=.08": {"loss_type": "gmpo", "epsilon": 0.08},
    "gspo_token sequence_token, loss_type=grpo": {"loss_type": "grpo", "importance_sampling_level": "sequence_token"},
    "grpo beta=0.04": {"loss_type": "grpo", "beta": 0.04, "kl": True},
    "grpo beta=0.04 bias_corr_kl": {"loss_type": "grpo", "beta": 0.04, "kl": True, "use_bias_correction_kl": True},
    "grpo top_entropy_quantile=0.2": {"loss_type": "grpo", "top_entropy_share": 0.2},
    "grpo off_policy_mask=0.01": {"loss_type": "grpo", "off_policy_mask_threshold": 0.01},
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
    # The gate of SAPO is 2 at ratio one, so its loss is 1/400 of its terms: float32 has no digits to spare.
    close(loss, expected_loss, **({"rtol": 0, "atol": 1e-7} if row == "sapo" else {}))
    close(fixture.norm(grad), expected_norm)


@pytest.mark.parametrize("row", ["sapo", "vespo", "gmpo eps=.08"])
def test_grpo_in_float64_equals_trl(row):
    with jax.enable_x64(True):
        (loss, _), grad = grpo(**GRPO_ROWS[row])
    close([loss, fixture.norm(grad)], fixture.GOLDEN["grpo"][row], rtol=1e-12)


def test_every_row_of_grpo_is_tested():
    assert {*GRPO_ROWS, "grpo on-policy(old=None)"} == set(fixture.GOLDEN["grpo"])


@pytest.mark.parametrize(("row", "epsilon"), [("eps=.2", 0.2), ("eps=.05", 0.05)])
def test_rloo_loss_and_gradient_equal_trl(row, epsilon):
    def loss(logits):
        log_probs = token_log_probs(logits[:, COMPLETION], jnp.asarray(TOKENS[:, fixture.GRPO_PROMPT :]))
        advantages = fixture.rounded(fixture.GRPO_ADVANTAGES)
        return rloo_loss(log_probs, scored("old"), advantages, MASK, epsilon=epsilon)[0]

    value, grad = jax.value_and_grad(loss)(fixture.rounded(fixture.logits(*TOKENS.shape, "policy")))
    expected_loss, expected_norm = fixture.GOLDEN["rloo"][row]
    close(value, expected_loss)
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

PPO_LENGTHS, SCORES = np.array([3, 5, 2]), np.array([1.0, -0.5, 0.25])
PAST = {"score_position": "after_last"}


@functools.partial(jax.jit, static_argnames=("estimator", "whiten"))
def ppo(estimator, whiten):
    base = np.arange(15.0).reshape(3, 5)
    mask = fixture.mask(PPO_LENGTHS, 5)
    old, reference = (fixture.rounded(-1.5 + 0.5 * f(base)) for f in (np.sin, np.cos))
    old_values = fixture.rounded(0.3 * np.sin(0.7 * base + 0.2))
    scored = {"log_probs": old, "ref_log_probs": reference, "kl_coef": 0.05, "kl_estimator": estimator}
    rewards = token_rewards(fixture.rounded(SCORES), mask, **scored, **PAST)
    learned = response_advantages(rewards, old_values, mask, gamma=1.0, lam=0.95, whiten_rewards=whiten, **PAST)
    loss, metrics = ppo_loss(
        fixture.rounded(-1.5 + 0.5 * np.sin(base) + 0.3 * np.cos(base)),
        old,
        learned.advantages,
        mask,
        values=fixture.rounded(0.3 * np.sin(0.7 * base + 0.2) + 0.4 * np.sin(base + 1)),
        old_values=old_values,
        returns=learned.returns,
        value_mask=learned.value_mask,
        cliprange_value=0.2,
        vf_coef=0.1,
        weights=loss_weights(fixture.rounded(mask), "token_mean", value_mask=fixture.rounded(learned.value_mask)),
    )
    return {
        "rewards": rewards,
        "advantages": learned.advantages,
        "returns": learned.returns,
        "pg_loss": metrics["loss/policy_avg"],
        "vf_loss": metrics["loss/value_avg"],
        "vf_clipfrac": metrics["val/clipfrac_avg"],
        "loss": loss,
    }


PPO_ROWS = {"ppo_k1": ("k1", False), "ppo_k3": ("k3", False), "ppo_k1_whiten_rewards": ("k1", True)}


@pytest.mark.parametrize("row", PPO_ROWS)
def test_ppo_from_rewards_to_loss_equals_trl(row):
    values = ppo(*PPO_ROWS[row])
    for name, expected in fixture.GOLDEN[row].items():
        # With whitened rewards the policy term is 0.005, the sum of terms near 1: float32 has no digits to spare.
        digits = {"rtol": 0, "atol": 2e-7} if (row, name) == ("ppo_k1_whiten_rewards", "pg_loss") else {}
        close(values[name], expected, err_msg=name, **digits)


@pytest.mark.parametrize("row", PPO_ROWS)
def test_ppo_in_float64_equals_trl(row):
    with jax.enable_x64(True):
        values = ppo(*PPO_ROWS[row])
    for name, expected in fixture.GOLDEN[row].items():
        close(values[name], expected, err_msg=name, rtol=1e-12, atol=1e-15)


def test_whitening_equals_trl():
    golden = fixture.GOLDEN["ppo masked_* x=[[1,2,3,4],[.5,-1,2,8]] mask=[[1,1,1,0],[1,1,0,0]]"]
    x, mask = jnp.array([[1.0, 2, 3, 4], [0.5, -1, 2, 8]]), jnp.array([[1, 1, 1, 0], [1, 1, 0, 0]])
    for name, shift in {"whiten": True, "whiten_noshift": False}.items():
        # Where masked, TRL leaves a number that nothing reads; ours is 0.
        close(masked_standardize(x, mask, shift_mean=shift), golden[name] * np.asarray(mask), err_msg=name)


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
