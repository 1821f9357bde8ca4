"""First-order optimizers by name, with warm-up, decay, clipping, and the right parameters left alone.

Adam and AdamW differ in where the weight decay acts. `adam` adds weight_decay × parameter to the gradient (coupled L2),
so Adam's denominator rescales it; `adamw` takes learning_rate × weight_decay × parameter off the parameter itself
(decoupled).

Against PyTorch, with the same numbers: adam, adamw, sgd, momentum and rmsprop take the same steps. `amsgrad` does not
quite: optax keeps the maximum of the bias-CORRECTED second moment, torch of the raw one, corrected afterwards; they
differ early in training, while the correction changes, and where gradients shrink.
"""

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias, cast, get_args

import jax
import optax

from jaxrl_llm.types import Numeric, Params

OptimizerName: TypeAlias = Literal["adamw", "adam", "amsgrad", "sgd", "momentum", "rmsprop"]
ScheduleName: TypeAlias = Literal["constant", "linear", "cosine"]
StateType: TypeAlias = Literal["float32", "bfloat16"]

WITHOUT_MOMENTUM = ("sgd", "rmsprop")
"""Optimizers that keep no mean or sum of gradients."""
UNDECAYED = ("bias", "scale")
"""Leaves with these names (biases, gains of norms) are not decayed."""


def make_schedule(
    learning_rate: Numeric,
    *,
    lr_scheduler_type: ScheduleName = "constant",
    warmup_steps: int = 0,
    total_steps: int | None = None,
) -> optax.Schedule:
    """Makes a learning rate as a function of the step: linear warm-up from 0, then constant or decay to 0.

    Args:
        learning_rate: Peak, reached after the warm-up; may be traced.
        lr_scheduler_type: `constant`, `linear` or `cosine` decay over the steps that follow the warm-up.
        warmup_steps: Length of the warm-up, in optimizer steps.
        total_steps: Length of the whole schedule, warm-up included; needed by linear and cosine.

    Raises:
        ValueError: If the name is unknown, or `total_steps` is missing or does not exceed `warmup_steps`.

    Example:
        >>> schedule = make_schedule(1.0, lr_scheduler_type="linear", warmup_steps=2, total_steps=6)
        >>> [float(schedule(step)) for step in range(7)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if lr_scheduler_type not in get_args(ScheduleName):
        raise ValueError(f"lr_scheduler_type must be one of {get_args(ScheduleName)}, got {lr_scheduler_type!r}.")
    if lr_scheduler_type == "constant":
        after = optax.constant_schedule(learning_rate)
    elif total_steps is None or total_steps <= warmup_steps:
        raise ValueError(
            f"lr_scheduler_type={lr_scheduler_type!r} needs total_steps greater than warmup_steps={warmup_steps}, got "
            f"{total_steps}."
        )
    elif lr_scheduler_type == "linear":
        after = optax.linear_schedule(learning_rate, 0.0, total_steps - warmup_steps)
    else:
        after = optax.cosine_decay_schedule(learning_rate, total_steps - warmup_steps)
    if warmup_steps == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup_steps), after], [warmup_steps])


def path_name(path: tuple) -> str:
    """Writes the path of a leaf as `blocks/qkv/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def decay_mask(params: Params) -> Params:
    """Tells for each leaf whether it is decayed: all but biases and the gains of norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path).rsplit("/", 1)[-1] not in UNDECAYED, params)


def _freeze(optimizer: optax.GradientTransformation, frozen: Sequence[str]) -> optax.GradientTransformation:
    """Leaves the subtrees whose paths begin with one of `frozen` as they are, without optimizer state for them."""

    def is_frozen(name: str) -> bool:
        return any(name == prefix or name.startswith(prefix + "/") for prefix in frozen)

    def labels(params: Params) -> Params:
        names = jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), params)
        unknown = [p for p in frozen if not any((n + "/").startswith(p + "/") for n in jax.tree.leaves(names))]
        if unknown:
            raise ValueError(f"frozen names no parameters: {unknown}. Paths look like {jax.tree.leaves(names)[:3]}.")
        return jax.tree.map(lambda name: "frozen" if is_frozen(name) else "trained", names)

    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def make_optimizer(
    optim: OptimizerName = "adamw",
    *,
    learning_rate: Numeric | optax.Schedule,
    weight_decay: Numeric = 0.0,
    max_grad_norm: Numeric | None = None,
    adam_beta1: Numeric = 0.9,
    adam_beta2: Numeric = 0.999,
    adam_epsilon: Numeric = 1e-8,
    momentum: Numeric = 0.9,
    rmsprop_decay: Numeric = 0.99,
    optim_state_dtype: StateType | None = None,
    frozen: Sequence[str] = (),
) -> optax.GradientTransformation:
    """Makes an optimizer: clip the gradient by its global norm, then the rule named, then the learning rate.

    Args:
        optim: `adamw`, `adam`, `amsgrad`, `sgd` (no momentum), `momentum` or `rmsprop`.
        learning_rate: A number, possibly traced, or a schedule (see `make_schedule`).
        weight_decay: Decoupled for adamw, coupled L2 for all others; never on biases and gains of norms.
        max_grad_norm: Largest global norm of the gradient (of trained parameters); None: no clipping.
        adam_beta1: Decay of the mean of gradients (adamw, adam, amsgrad).
        adam_beta2: Decay of the mean of squared gradients.
        adam_epsilon: Added to the root of the second moment; for rmsprop too.
        momentum: Decay of the sum of gradients, for `momentum`.
        rmsprop_decay: Decay of the mean of squared gradients, for `rmsprop` (torch's alpha; optax's own default is
            0.9).
        optim_state_dtype: Type of the first moment, the mean (of `momentum`, the sum) of gradients, between two steps;
            None: that of the parameters. bfloat16 halves it, so that Adam keeps 6 bytes of state a parameter instead of
            8. The second moment keeps the type of the parameters in any case: with β2 = 0.999 a step changes it by about
            0.1 %, and bfloat16 rounds changes below 0.2 % away, so it would stand still.
        frozen: Paths of subtrees that are not trained, such as `("token_embedding", "blocks/mlp_in")`.

    Raises:
        ValueError: If the name is unknown, if `optim_state_dtype` is bfloat16 and the optimizer has no first moment, or
            if `frozen` names nothing (raised by `init`).

    References:
        Kingma and Ba, 2015. https://arxiv.org/abs/1412.6980; Loshchilov and Hutter, 2019.
        https://arxiv.org/abs/1711.05101; Reddi et al., 2018 (AMSGrad). https://arxiv.org/abs/1904.09237
    """
    rules: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adamw": lambda: optax.scale_by_adam(adam_beta1, adam_beta2, adam_epsilon, mu_dtype=optim_state_dtype),
        "adam": lambda: optax.scale_by_adam(adam_beta1, adam_beta2, adam_epsilon, mu_dtype=optim_state_dtype),
        "amsgrad": lambda: optax.scale_by_amsgrad(adam_beta1, adam_beta2, adam_epsilon, mu_dtype=optim_state_dtype),
        "sgd": optax.identity,
        "momentum": lambda: optax.trace(momentum, accumulator_dtype=optim_state_dtype),
        "rmsprop": lambda: optax.scale_by_rms(rmsprop_decay, adam_epsilon, eps_in_sqrt=False),
    }
    if optim not in rules:
        raise ValueError(f"optim must be one of {tuple(rules)}, got {optim!r}.")
    if optim_state_dtype not in (None, "float32") and optim in WITHOUT_MOMENTUM:
        raise ValueError(
            f"optim_state_dtype must be None or 'float32' for {optim}, which keeps no first moment, got "
            f"{optim_state_dtype!r}."
        )
    decay = optax.add_decayed_weights(cast(float, weight_decay), mask=decay_mask)
    rule = [rules[optim](), decay] if optim == "adamw" else [decay, rules[optim]()]
    clip = [] if max_grad_norm is None else [optax.clip_by_global_norm(max_grad_norm)]
    optimizer = optax.chain(*clip, *rule, optax.scale_by_learning_rate(cast(optax.ScalarOrSchedule, learning_rate)))
    return _freeze(optimizer, frozen) if frozen else optimizer
