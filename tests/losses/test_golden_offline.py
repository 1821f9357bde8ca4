"""Losses and gradient norms of TRL's own code for preferences and distillation, see `tests/golden`. In float32, to 2e-6."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.log_probs import TokenStatistics, token_statistics
from jaxrl_llm.losses import (
    cpo_loss,
    distillation_loss,
    dpo_loss,
    kto_kl,
    kto_loss,
    orpo_loss,
    sequence_log_probs,
    wpo_weights,
)
from jaxrl_llm.reductions import masked_mean
from tests.golden import fixture

close = functools.partial(np.testing.assert_allclose, rtol=fixture.RTOL)

# Eight rows of two prompt tokens and six of the response. For DPO rows 0 to 3 are the chosen of 4 to 7.

PROMPT = 2
TOKENS = jnp.asarray(fixture.tokens(8, 8))
LENGTHS = jnp.asarray(fixture.DPO_LENGTHS)
MASK = fixture.mask(fixture.DPO_LENGTHS, 6)


def respond(logits, tokens=TOKENS) -> TokenStatistics:
    """Scores the responses; position t predicts the token after it."""
    return token_statistics(logits[:, PROMPT - 1 : -1], tokens[:, PROMPT:])


def logits_of(kind):
    return fixture.rounded(fixture.logits(8, 8, kind))


def reference_log_probs(kind, tokens=TOKENS):
    logits = fixture.logits(8, 8, kind)[:, PROMPT - 1 : -1]
    return fixture.rounded(fixture.log_probs(logits, np.asarray(tokens)[:, PROMPT:]))


PLAIN_DPO_ROWS = (
    *("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"),
    *("discopop", "sft", "sigmoid_norm"),
)
DPO_ROWS = {name: {"loss_type": name} for name in PLAIN_DPO_ROWS} | {
    "exo_pair ls=1e-3": {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    "robust ls=0.1": {"loss_type": "robust", "label_smoothing": 0.1},
    "aot ls=0.1": {"loss_type": "aot", "label_smoothing": 0.1},
    "sigmoid f=forward_kl": {"f_divergence_type": "forward_kl"},
    "sigmoid f=js_divergence": {"f_divergence_type": "js_divergence"},
    "sigmoid f=alpha_divergence": {"f_divergence_type": "alpha_divergence"},
    "sigmoid ld_alpha=0.5": {"ld_alpha": 0.5},
    "sigmoid wpo": {"wpo": True},
    "sigmoid+bco_pair+sft w=.8,.2,1": {
        "loss_type": ("sigmoid", "bco_pair", "sft"),
        "loss_weights": (0.8, 0.2, 1.0),
    },
}


def dpo(logits, *, ld_alpha=1.0, wpo=False, **options):
    statistics = respond(logits)
    shared = {"ld_alpha": ld_alpha, "shared_lengths": jnp.tile(jnp.minimum(LENGTHS[:4], LENGTHS[4:]), 2)}
    policy = sequence_log_probs(statistics.log_probs, MASK, **shared)
    reference = sequence_log_probs(reference_log_probs("reference"), MASK, **shared)
    if wpo:
        each = wpo_weights(statistics.log_probs, statistics.log_sum_sq_probs, MASK)
        options["pair_weights"] = each[:4] * each[4:]
    lengths = {"chosen_lengths": LENGTHS[:4], "rejected_lengths": LENGTHS[4:]}
    pairs = policy[:4], policy[4:], reference[:4], reference[4:]
    return dpo_loss(*pairs, beta=0.1, **lengths, **options)


@functools.cache
def every_dpo_row():
    """Computes loss, metrics, and gradient of all rows, in one program."""

    @jax.jit
    def rows(logits):
        return {
            name: jax.value_and_grad(functools.partial(dpo, **options), has_aux=True)(logits)
            for name, options in DPO_ROWS.items()
        }

    return jax.device_get(rows(logits_of("policy")))


def test_every_golden_row_of_dpo_is_tested():
    assert set(DPO_ROWS) == set(fixture.GOLDEN["dpo"])


@pytest.mark.parametrize("row", DPO_ROWS)
def test_dpo_loss_and_gradient_equal_trl(row):
    (loss, _), grad = every_dpo_row()[row]
    expected_loss, expected_norm = fixture.GOLDEN["dpo"][row]
    close(loss, expected_loss)
    close(fixture.norm(grad), expected_norm)


def test_dpo_metrics_equal_trl():
    (_, metrics), _ = every_dpo_row()["sigmoid"]
    expected = dict(fixture.GOLDEN["dpo_metrics"])
    assert expected.pop("num_tokens") == fixture.DPO_LENGTHS.sum() + 8 * PROMPT
    statistics = jax.jit(respond)(logits_of("policy"))
    logits = statistics.mean_log_probs + statistics.logsumexp
    ours = metrics | {
        # TRL logs accuracy over the chosen responses, entropy over all.
        "mean_token_accuracy": masked_mean(statistics.is_argmax[:4].astype(jnp.float32), MASK[:4]),
        "entropy": masked_mean(statistics.entropy, MASK),
        "logits/chosen": masked_mean(logits[:4], MASK[:4]),
        "logits/rejected": masked_mean(logits[4:], MASK[4:]),
    }
    assert set(ours) == set(expected)
    for name, value in expected.items():
        close(ours[name], value, err_msg=name)


# KTO: the reference point comes from responses rolled by one row, scored with the logits of their new place.

LABELS = jnp.array([True, False, True, False, False, True, True, False])
ROLLED = TOKENS.at[:, PROMPT:].set(jnp.roll(TOKENS, 1, axis=0)[:, PROMPT:])
KTO_ROWS = {
    "kto": {},
    "kto (pol<->ref swapped)": {"kinds": ("reference", "policy")},
    "kto swapped dw=1.33": {"kinds": ("reference", "policy"), "desirable_weight": 1.33},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
}


@functools.partial(jax.jit, static_argnames=("kinds", "loss_type"))
@functools.partial(jax.value_and_grad, has_aux=True)
def kto(logits, *, kinds=("policy", "reference"), loss_type="kto", desirable_weight=1.0):
    def summed(log_probs, mask=MASK):
        return sequence_log_probs(log_probs, mask)

    rolled_mask = jnp.roll(MASK, 1, axis=0)
    policy, rolled = (respond(logits, tokens).log_probs for tokens in (TOKENS, ROLLED))
    reference, rolled_reference = (reference_log_probs(kinds[1], tokens) for tokens in (TOKENS, ROLLED))
    kl = kto_kl(summed(rolled, rolled_mask), summed(rolled_reference, rolled_mask))
    options = {"kl": kl, "loss_type": loss_type, "desirable_weight": desirable_weight}
    loss, _ = kto_loss(summed(policy), summed(reference), LABELS, beta=0.1, **options)
    return loss, kl


@pytest.mark.parametrize("row", KTO_ROWS)
def test_kto_loss_gradient_and_reference_point_equal_trl(row):
    options = KTO_ROWS[row]
    (loss, kl), grad = kto(logits_of(options.get("kinds", ["policy"])[0]), **options)
    expected_loss, expected_norm, expected_kl = fixture.GOLDEN["kto"][row]
    close(loss, expected_loss)
    close(fixture.norm(grad), expected_norm)
    if options.get("loss_type") != "apo_zero_unpaired":  # It has none, TRL says 0.
        close(kl, expected_kl)


def test_every_golden_row_of_kto_is_tested():
    assert set(KTO_ROWS) == set(fixture.GOLDEN["kto"])


# Without a reference

CHOSEN, REJECTED = jnp.array([-0.8, -1.5, -0.3]), jnp.array([-1.1, -0.9, -2.0])


def test_orpo_equals_trl():
    expected = fixture.GOLDEN["orpo cw=[-.8,-1.5,-.3] rj=[-1.1,-.9,-2] beta=.1"]
    _, metrics = orpo_loss(CHOSEN, REJECTED, 0.0, beta=0.1)
    close(metrics["log_odds_ratio"], expected["mean_ratio"])
    close(metrics["log_odds_chosen"], expected["mean_log_odds"])
    for row, value in enumerate(expected["beta*logsigmoid(log_odds)"]):
        close(-orpo_loss(CHOSEN, REJECTED, 0.0, beta=0.1, weights=jnp.eye(3)[row])[0], value)


CPO_ROWS = {
    "sigmoid": {"loss_type": "sigmoid"},
    "sigmoid ls=.1": {"loss_type": "sigmoid", "label_smoothing": 0.1},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "simpo g=.5": {"loss_type": "simpo", "simpo_gamma": 0.5},
    "simpo alpha=.25": {"loss_type": "simpo", "alpha": 0.25},
}


def test_cpo_equals_trl():
    expected = fixture.GOLDEN["cpo cw,rj as orpo beta=.1"]
    assert set(CPO_ROWS) == set(expected)
    for row, options in CPO_ROWS.items():
        close(cpo_loss(CHOSEN, REJECTED, beta=0.1, **options)[0], expected[row], err_msg=row)


# Distillation. TRL's "batchmean" is the sum over tokens, divided by the rows.


def test_distillation_equals_trl():
    golden = dict(fixture.GOLDEN["gkd generalized_jsd_loss batchmean (B2,T3,V7 pol/ref, labels none)"])
    student, teacher = (fixture.rounded(fixture.logits(2, 3, kind)) for kind in ("policy", "reference"))
    mask = jnp.ones((2, 3))
    distill = jax.jit(functools.partial(distillation_loss, student, teacher, mask, weights=mask / 2))
    for beta, temperature in ((0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (0.5, 2.0)):
        loss, _ = distill(beta=beta, temperature=temperature)
        close(loss, golden.pop(f"beta={beta} T={temperature}"))
    assert not golden
