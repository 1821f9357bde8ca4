"""Every loss once, with inputs: the contract tests of the losses and of the train step run over this list."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxrl_llm.log_probs import TokenStatistics
from jaxrl_llm.losses import (
    bco_loss,
    cpo_loss,
    cross_entropy_loss,
    distillation_loss,
    dpo_loss,
    dpo_weights,
    grpo_loss,
    kto_loss,
    orpo_loss,
    policy_gradient_loss,
    ppo_loss,
    q_learning_loss,
    reward_model_loss,
    reward_regression_loss,
    rloo_loss,
    rloo_weights,
    top_entropy_mask,
    unpaired_weights,
    value_loss,
)
from jaxrl_llm.losses.group_relative import grpo_weights
from jaxrl_llm.reductions import loss_weights, token_weights

Batch = dict[str, Any]
ROWS, TIME, VOCAB = 8, 6, 5
PER_PAIR = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "chosen", "rejected", "margin")
AVERAGED = ("mean_chosen", "mean_rejected")
LENGTHS = ("chosen_lengths", "rejected_lengths")
PER_ROW = (*PER_PAIR, *AVERAGED, "pair_weights")
"""Floating fields `[rows]` that count where `row_mask` does. (`advantages`, `labels`, and lengths are `[rows]` too,
`*_logits` have a vocabulary; the others are `[rows, time]`.)"""


class LossCase(NamedTuple):
    """A loss of a batch.

    Attributes:
        loss: `(batch, weights, axis_name) -> (loss, metrics)`; weights may be None.
        weights: `(batch, axis_name) -> weights` of the whole batch.
        trained: Fields that have a gradient; all other fields are constants.
    """

    loss: Callable
    weights: Callable
    trained: tuple[str, ...]


def _cross_entropy(batch: Batch, weights: Any, axis_name: str | None) -> tuple:
    return cross_entropy_loss(batch["log_probs"], batch["mask"], weights=weights, axis_name=axis_name)


def _dft(batch: Batch, weights: Any, axis_name: str | None) -> tuple:
    return cross_entropy_loss(batch["log_probs"], batch["mask"], loss_type="dft", weights=weights, axis_name=axis_name)


def _regularized_cross_entropy(batch: Batch, weights: Any, axis_name: str | None) -> tuple:
    statistics = TokenStatistics(
        log_probs=batch["log_probs"],
        entropy=batch["entropy"],
        logsumexp=batch["logsumexp"],
        mean_log_probs=batch["mean_log_probs"],
        is_argmax=batch["log_probs"] > -1,
        log_sum_sq_probs=batch["mean_log_probs"],
    )
    return cross_entropy_loss(
        batch["log_probs"],
        batch["mask"],
        label_smoothing=0.1,
        z_loss=0.01,
        statistics=statistics,
        weights=weights,
        axis_name=axis_name,
    )


def _policy_gradient(batch: Batch, weights: Any, axis_name: str | None) -> tuple:
    return policy_gradient_loss(
        batch["log_probs"],
        batch["advantages"],
        batch["mask"],
        entropy=batch["entropy"],
        entropy_coef=0.05,
        weights=weights,
        axis_name=axis_name,
    )


def _ppo(batch: Batch, weights: Any, axis_name: str | None) -> tuple:
    return ppo_loss(
        batch["log_probs"],
        batch["old_log_probs"],
        batch["advantages"],
        batch["mask"],
        values=batch["values"],
        old_values=batch["old_values"],
        returns=batch["returns"],
        entropy=batch["entropy"],
        cliprange_value=0.3,
        entropy_coef=0.05,
        weights=weights,
        axis_name=axis_name,
    )


def _value(batch: Batch, weights: Any, axis_name: str | None) -> tuple:
    return value_loss(batch["values"], batch["returns"], batch["mask"], weights=weights, axis_name=axis_name)


def _grpo(loss_type: str, level: str = "token") -> LossCase:
    def loss(batch: Batch, weights: Any, axis_name: str | None) -> tuple:
        return grpo_loss(
            batch["log_probs"],
            batch["old_log_probs"],
            batch["advantages"],
            batch["mask"],
            ref_log_probs=batch["ref_log_probs"],
            entropy=batch["entropy"],
            loss_type=loss_type,
            importance_sampling_level=level,
            epsilon_high=0.28,
            delta=1.6,
            beta=0.04,
            max_completion_length=10,
            entropy_coef=0.05,
            weights=weights,
            axis_name=axis_name,
        )

    def weights(batch: Batch, axis_name: str | None) -> Any:
        return grpo_weights(batch["mask"], loss_type, max_completion_length=10, axis_name=axis_name)

    return LossCase(loss, weights, ("log_probs", "entropy"))


def _variant(loss_type: str, fields: tuple[str, ...] = (), **options: Any) -> LossCase:
    """A type of GRPO with options of its own, and with the arrays of the batch that it takes."""

    def loss(batch: Batch, weights: Any, axis_name: str | None) -> tuple:
        return grpo_loss(
            batch["log_probs"],
            batch["old_log_probs"],
            batch["advantages"],
            batch["mask"],
            loss_type=loss_type,
            **{name: batch[name] for name in fields},
            **options,
            weights=weights,
            axis_name=axis_name,
        )

    def weights(batch: Batch, axis_name: str | None) -> Any:
        return grpo_weights(batch["mask"], loss_type, axis_name=axis_name)

    return LossCase(loss, weights, ("log_probs", *(name for name in fields if name == "ref_kl")))


class OfTopEntropy(NamedTuple):
    """What a loss of the uncertain tokens takes from the whole batch."""

    weights: Any
    entropy_mask: jax.Array


def _top_entropy() -> LossCase:
    def loss(batch: Batch, weights: OfTopEntropy | None, axis_name: str | None) -> tuple:
        arrays = {"ref_log_probs": batch["ref_log_probs"], "entropy": batch["entropy"]}
        if weights is None:
            arrays["top_entropy_quantile"] = 0.4
        else:
            arrays |= {"weights": weights.weights, "entropy_mask": weights.entropy_mask}
        fields = (batch[name] for name in ("log_probs", "old_log_probs", "advantages", "mask"))
        return grpo_loss(*fields, beta=0.04, entropy_coef=0.05, **arrays, axis_name=axis_name)

    def weights(batch: Batch, axis_name: str | None) -> OfTopEntropy:
        kept = top_entropy_mask(batch["entropy"], batch["mask"], 0.4, axis_name=axis_name)
        return OfTopEntropy(grpo_weights(batch["mask"], entropy_mask=kept, axis_name=axis_name), kept)

    return LossCase(loss, weights, ("log_probs", "entropy"))


def _rloo(batch: Batch, weights: Any, axis_name: str | None) -> tuple:
    fields = (batch[name] for name in ("log_probs", "old_log_probs", "advantages", "mask"))
    bonus = {"entropy": batch["entropy"], "entropy_coef": 0.05}
    return rloo_loss(*fields, epsilon=0.5, **bonus, weights=weights, axis_name=axis_name)


def _rloo_weights(batch: Batch, axis_name: str | None) -> Any:
    return rloo_weights(batch["mask"], axis_name=axis_name)


def _pairs(batch: Batch) -> list:
    return [batch[name] for name in PER_PAIR[:4]]


def _dpo(batch: Batch, weights: Any, axis_name: str | None) -> tuple:
    return dpo_loss(*_pairs(batch), beta=0.3, label_smoothing=0.1, weights=weights, axis_name=axis_name)


DPO_TYPES = {
    **{"sigmoid": 0.5, "hinge": 0.6, "ipo": 0.03, "exo_pair": 0.7, "nca_pair": 0.8, "robust": 0.9, "bco_pair": 1.0},
    **{"sppo_hard": 0.02, "apo_zero": 1.1, "apo_down": 1.2, "discopop": 0.4, "sft": 1.3, "sigmoid_norm": 1.4},
}
"""All types whose batch may be split, each with a weight of its own and about as strong as the others."""


def _several_dpo(loss_types: dict[str, float], fields: tuple[str, ...] = (), **options: Any) -> LossCase:
    def loss(batch: Batch, weights: Any, axis_name: str | None) -> tuple:
        return dpo_loss(
            *_pairs(batch),
            beta=0.3,
            loss_type=tuple(loss_types),
            loss_weights=tuple(loss_types.values()),
            label_smoothing=0.1,
            discopop_tau=0.5,
            **{name: batch[name] for name in (*LENGTHS, *fields)},
            **options,
            weights=weights,
            axis_name=axis_name,
        )

    return LossCase(loss, _dpo_weights, PER_PAIR[:2])


def _dpo_weights(batch: Batch, axis_name: str | None) -> Any:
    return dpo_weights(batch["chosen_lengths"], mask=batch["row_mask"], axis_name=axis_name)


def _unpaired(function: Callable, **options: Any) -> LossCase:
    def loss(batch: Batch, weights: Any, axis_name: str | None) -> tuple:
        fields = batch["policy_chosen"], batch["ref_chosen"], batch["labels"]
        return function(*fields, beta=0.3, **options, weights=weights, axis_name=axis_name)

    def weights(batch: Batch, axis_name: str | None) -> Any:
        return unpaired_weights(batch["labels"], mask=batch["row_mask"], axis_name=axis_name)

    return LossCase(loss, weights, ("policy_chosen",))


class WithLikelihood(NamedTuple):
    """Weights of a loss of pairs that has a likelihood term."""

    rows: jax.Array
    tokens: jax.Array


def _reference_free(function: Callable, **options: Any) -> LossCase:
    """A loss of averaged log-probabilities, with the likelihood of the tokens: a share, as the loss itself."""

    def loss(batch: Batch, weights: Any, axis_name: str | None) -> tuple:
        rows, tokens = (None, None) if weights is None else weights
        nll, _ = cross_entropy_loss(batch["log_probs"], batch["mask"], weights=tokens, axis_name=axis_name)
        pairs = [batch[name] for name in AVERAGED]
        return function(*pairs, nll=nll, beta=0.3, **options, weights=rows, axis_name=axis_name)

    def weights(batch: Batch, axis_name: str | None) -> Any:
        return WithLikelihood(_row_mean(batch, axis_name), _token_mean(batch, axis_name))

    return LossCase(loss, weights, (*AVERAGED, "log_probs"))


def _distillation(batch: Batch, weights: Any, axis_name: str | None) -> tuple:
    logits = batch["student_logits"], batch["teacher_logits"]
    options = {"beta": 0.3, "temperature": 1.5}
    return distillation_loss(*logits, batch["mask"], **options, weights=weights, axis_name=axis_name)


def _reward_model(batch: Batch, weights: Any, axis_name: str | None) -> tuple:
    return reward_model_loss(
        batch["chosen"],
        batch["rejected"],
        margin=batch["margin"],
        center_rewards_coefficient=0.01,
        weights=weights,
        axis_name=axis_name,
    )


def _reward_regression(batch: Batch, weights: Any, axis_name: str | None) -> tuple:
    return reward_regression_loss(batch["chosen"], batch["rejected"], weights=weights, axis_name=axis_name)


def _q_learning(batch: Batch, weights: Any, axis_name: str | None) -> tuple:
    """Of logits as action values; the labels are actions, rewards are 0 or 1 apart."""
    q_values, target = batch["student_logits"][:, 0], batch["teacher_logits"][:, 0]
    actions, discounts = batch["labels"].astype("int32"), batch["labels"] * 0.9
    options = {"next_q_online": target[:, ::-1], "huber_delta": 0.7, "weights": weights, "axis_name": axis_name}
    return q_learning_loss(q_values, actions, batch["margin"], discounts, target, **options)


def _token_mean(batch: Batch, axis_name: str | None) -> Any:
    return token_weights(batch["mask"], "token_mean", axis_name=axis_name)


def _token_means(batch: Batch, axis_name: str | None) -> Any:
    return loss_weights(batch["mask"], "token_mean", axis_name=axis_name)


def _row_mean(batch: Batch, axis_name: str | None) -> Any:
    return token_weights(batch["row_mask"], "token_mean", axis_name=axis_name)


CASES = {
    "cross_entropy": LossCase(_cross_entropy, _token_mean, ("log_probs",)),
    "cross_entropy_regularized": LossCase(
        _regularized_cross_entropy, _token_mean, ("log_probs", "logsumexp", "mean_log_probs")
    ),
    "policy_gradient": LossCase(_policy_gradient, _token_means, ("log_probs", "entropy")),
    "ppo": LossCase(_ppo, _token_means, ("log_probs", "values", "entropy")),
    "value": LossCase(_value, _token_mean, ("values",)),
    "grpo": _grpo("grpo"),
    "bnpo": _grpo("bnpo"),
    "dr_grpo": _grpo("dr_grpo"),
    "dapo": _grpo("dapo"),
    "gspo": _grpo("grpo", "sequence"),
    "cispo": _variant("cispo", ("correction",), epsilon_high=1.2),
    "sapo": _variant("sapo", ("ref_log_probs",), beta=0.04, use_bias_correction_kl=True),
    "vespo": _variant("vespo", ("correction",)),
    "luspo": _variant("luspo", ("ref_kl",), importance_sampling_level="sequence", beta=0.1),
    "gmpo": _variant("gmpo", ("ref_log_probs",), beta=0.04, kl_estimator="k2"),
    "gspo_token": _variant("grpo", importance_sampling_level="sequence_token"),
    "off_policy_mask": _variant("grpo", ("sampling_log_probs",), off_policy_mask_threshold=0.05),
    "top_entropy": _top_entropy(),
    "rloo": LossCase(_rloo, _rloo_weights, ("log_probs", "entropy")),
    "cross_entropy_dft": LossCase(_dft, _token_mean, ("log_probs",)),
    "distillation": LossCase(_distillation, _token_mean, ("student_logits",)),
    "q_learning": LossCase(_q_learning, _row_mean, ("student_logits",)),
    "dpo": LossCase(_dpo, _row_mean, PER_PAIR[:2]),
    "dpo_every_type": _several_dpo(DPO_TYPES),
    "dpo_weighted": _several_dpo({"sigmoid": 1.0, "ipo": 0.2}, ("pair_weights",), f_divergence_type="js_divergence"),
    "kto": _unpaired(kto_loss, kl=0.7, desirable_weight=1.3, undesirable_weight=0.8),
    "bco": _unpaired(bco_loss, delta=0.2),
    "orpo": _reference_free(orpo_loss),
    "cpo": _reference_free(cpo_loss, label_smoothing=0.1, cpo_alpha=0.7),
    "simpo": _reference_free(cpo_loss, loss_type="simpo", alpha=0.25, cpo_alpha=0.1),
    "reward_regression": LossCase(_reward_regression, _row_mean, ("chosen",)),
    "reward_model": LossCase(_reward_model, _row_mean, ("chosen", "rejected")),
}


def random_mask(seed: int, rows: int = ROWS, time: int = TIME) -> np.ndarray:
    """Makes rows of unequal length, one of them empty."""
    lengths = np.random.default_rng(seed).permuted(np.arange(rows) % (time + 1))
    return np.arange(time) < lengths[:, None]


def make_batch(seed: int, mask: np.ndarray) -> Batch:
    """Makes one batch that serves all losses; a row counts for the losses of rows if its first token does.

    Arrays are numpy's, so that a test can cut and spoil them without compiling anything.
    """
    rng, shape = np.random.default_rng(seed), mask.shape
    log_probs = rng.uniform(-4, -0.1, shape)
    values = rng.normal(size=shape)
    batch = {
        "log_probs": log_probs,
        "old_log_probs": log_probs + rng.normal(scale=0.4, size=shape),
        "ref_log_probs": log_probs + rng.normal(scale=0.4, size=shape),
        "sampling_log_probs": log_probs + rng.normal(scale=0.4, size=shape),
        "correction": rng.uniform(0.2, 3, shape),
        "ref_kl": rng.uniform(0, 1, shape),
        "mean_log_probs": rng.uniform(-6, -2, shape),
        "logsumexp": rng.normal(size=shape),
        "entropy": rng.uniform(0.1, 3, shape),
        "values": values,
        "old_values": values + rng.normal(scale=0.4, size=shape),
        "returns": rng.normal(size=shape),
        "advantages": rng.normal(size=shape[:1]),
        "mask": mask,
        "row_mask": mask[:, 0],
    }
    batch |= {name: rng.normal(scale=2, size=shape[:1]) for name in PER_PAIR}
    batch |= {name: rng.uniform(-4, -1, shape[:1]) for name in AVERAGED}
    batch |= {name: rng.integers(1, 9, shape[:1]) for name in LENGTHS}
    batch |= {name: rng.normal(scale=2, size=(*shape, VOCAB)) for name in ("student_logits", "teacher_logits")}
    return batch | {"pair_weights": rng.uniform(0.1, 1, shape[:1]), "labels": rng.random(shape[0]) < 0.5}


def whole_weights(batch: Batch, axis_name: str | None = None) -> dict[str, Any]:
    """Makes the weights of all cases from the whole batch."""
    return {name: case.weights(batch, axis_name) for name, case in CASES.items()}


class Result(NamedTuple):
    """What a loss gives: everything that splitting, padding, and sharding must leave alone."""

    loss: jax.Array
    metrics: dict[str, jax.Array]
    grads: dict[str, jax.Array]


def evaluate(batch: Batch, weights: dict[str, Any], axis_name: str | None = None) -> dict[str, Result]:
    """Computes value, metrics, and gradient of every case, so that one compilation serves all."""
    results = {}
    for name, case in CASES.items():

        def loss(trained: dict, name: str = name, case: LossCase = case) -> tuple:
            return case.loss(batch | trained, weights[name], axis_name)

        trained = {field: batch[field] for field in case.trained}
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        results[name] = Result(value, metrics, grads)
    return results
