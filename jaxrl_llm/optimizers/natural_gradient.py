r"""The natural gradient with a trust region (TRPO), as an optax transformation.

Where a plain gradient asks which change of PARAMETERS of a given length improves most, the natural gradient asks which
change of the POLICY does, measured by the KL divergence. It solves $F x = g$ with the Fisher matrix $F$ by conjugate
gradients, which needs only products of $F$ with vectors, scales the step so that the KL would be `max_kl` if KL were
quadratic, and shortens it until the exact KL is within `max_kl` and the objective has improved.

The same code serves a policy for CartPole and a language model: they differ in the functions given to `update`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from jaxrl_llm.optimizers.fisher import (
    DistributionFunction,
    FisherFunction,
    at_least_float32,
    categorical_fisher,
    fisher_vector_product,
)
from jaxrl_llm.optimizers.linear_solve import conjugate_gradient, dot, ratio
from jaxrl_llm.reductions import mark_varying, sum_over_axis
from jaxrl_llm.types import Metrics, Numeric, Params, Scalar


class NaturalGradientState(NamedTuple):
    """How the last step went; training does not depend on it.

    Attributes:
        kl: Exact mean KL(old || new) of the step made, nats; 0 if none was made.
        step_fraction: Share of the full step that was made, `backtrack_coef` to the power of `backtracks`; 0 if none.
        accepted: Whether a step was made.
        backtracks: How many step lengths were refused.
        surrogate_improvement: By how much the surrogate rose; 0 if no step was made.
        expected_improvement: By how much it should have risen for the FULL step, to first order.
        cg_residual: What remains of the equation, ‖g − (F + damping) x‖ / ‖g‖; 0 would be an exact solution.
    """

    kl: Float[Array, ""]
    step_fraction: Float[Array, ""]
    accepted: Bool[Array, ""]
    backtracks: Int[Array, ""]
    surrogate_improvement: Float[Array, ""]
    expected_improvement: Float[Array, ""]
    cg_residual: Float[Array, ""]


def natural_gradient_metrics(opt_state: optax.OptState) -> Metrics:
    """Reads the metrics of the last step out of an optimizer state, in a chain too.

    Returns:
        `trpo/kl`, `trpo/step_fraction`, `trpo/accepted`, `trpo/backtracks`, `trpo/surrogate_improvement`,
        `trpo/expected_improvement` and `trpo/cg_residual`, see `NaturalGradientState`; empty for other optimizers.
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, NaturalGradientState))
    states = [node for node in nodes if isinstance(node, NaturalGradientState)]
    return {
        f"trpo/{name}": value.astype(jnp.float32)
        for state in states
        for name, value in zip(state._fields, state, strict=True)
    }


def natural_gradient(
    max_kl: Numeric = 0.01,
    cg_iters: int = 10,
    cg_damping: Numeric = 0.1,
    backtrack_coef: Numeric = 0.8,
    backtrack_iters: int = 10,
    accept_ratio: Numeric = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Makes the optimizer of trust region policy optimization (TRPO).

    $$ x = (F + \lambda I)^{-1} g, \qquad \Delta = \alpha^j \sqrt{\frac{2\delta}{x^\top (F + \lambda I) x}}\; x $$

    with $j$ the first of 0, 1 … for which $\mathrm{KL}(old \| new) \le \delta$ and the surrogate rises by more than
    `accept_ratio` times what its gradient promises for this $\Delta$. If there is none, parameters stay as they are, to the
    bit.

    `update` needs, by keyword, functions of the parameters that cover the whole batch:
    `distribution_fn(params) -> outputs` and `fisher_fn(outputs, tangents) -> cotangents` (see `optimizers.fisher`; not
    given: outputs are logits and all samples weigh the same), `surrogate_fn(params) -> scalar`, what is to be maximised:
    minus the loss that `grads` is the gradient of, at least to first order, and `kl_fn(params) -> scalar`, the exact mean
    KL from the old policy, with the weights of the Fisher. `evaluate_fn(params) -> (surrogate, kl)` may give both from one
    forward pass. With `axis_name`, each function returns this device's share
    and `grads` is already summed. `rollouts.policy_functions` makes them all for a language model.

    All of `params` is trained: freeze by closing over (a LoRA tree alone is fine). Rules chained behind this one change
    the step, and then nothing holds of the KL. Parameters of a value function belong elsewhere: the policy does not
    depend on them, so the surrogate would not judge their step.

    Args:
        max_kl: Largest mean KL of a step, nats per sample, positive (δ).
        cg_iters: Iterations of conjugate gradients, each a forward- and reverse-mode product.
        cg_damping: Added to the diagonal of the Fisher matrix (λ), at least 0. Larger: closer to the plain gradient.
        backtrack_coef: Factor between two tried lengths, in (0, 1) (α).
        backtrack_iters: Most lengths that are tried.
        accept_ratio: Least improvement, as a share of that expected, at least 0.

    Returns:
        The transformation; its state is a `NaturalGradientState`. All but the two counts may be traced.

    Raises:
        ValueError: If a count is not positive, or `update` gets no parameters, or no `fisher_fn` for outputs that are
            not one array.

    References:
        Schulman et al., 2015, section 6 and appendix C. https://arxiv.org/abs/1502.05477

    Example:
        >>> optimizer, params = natural_gradient(max_kl=0.01, cg_damping=0.0), jnp.zeros(2)
        >>> def expected_reward(logits):
        ...     return jax.nn.softmax(logits)[0]
        >>> def kl(logits):
        ...     return jnp.mean(jnp.log(0.5) - jax.nn.log_softmax(logits))
        >>> grads = -jax.grad(expected_reward)(params)
        >>> updates, state = optimizer.update(grads, optimizer.init(params), params, distribution_fn=lambda logits: logits,
        ...                                   surrogate_fn=expected_reward, kl_fn=kl)
        >>> round(float(state.kl), 3), bool(updates[0] > updates[1])
        (0.01, True)
    """
    for name, count in {"cg_iters": cg_iters, "backtrack_iters": backtrack_iters}.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")

    def init(params: Params) -> NaturalGradientState:
        del params
        # An array for each field: a step may give the memory of its state away, and no memory twice.
        fields = NaturalGradientState._fields
        zeros = {
            name: jnp.zeros((), {"accepted": bool, "backtracks": jnp.int32}.get(name, jnp.float32)) for name in fields
        }
        return NaturalGradientState(**zeros)

    def update(
        grads: Params,
        state: NaturalGradientState,
        params: Params | None = None,
        *,
        distribution_fn: DistributionFunction,
        surrogate_fn: Callable[[Params], Scalar],
        kl_fn: Callable[[Params], Scalar],
        fisher_fn: FisherFunction | None = None,
        evaluate_fn: Callable[[Params], tuple[Scalar, Scalar]] | None = None,
        axis_name: str | None = None,
        **extra_args: Any,
    ) -> tuple[Params, NaturalGradientState]:
        del state, extra_args
        if params is None:
            raise ValueError("natural_gradient needs the parameters: call update(grads, state, params, …).")
        fisher_fn = _equal_categoricals(axis_name) if fisher_fn is None else fisher_fn
        product = fisher_vector_product(distribution_fn, fisher_fn, params, damping=cg_damping, axis_name=axis_name)
        ascent = jax.tree.map(jnp.negative, at_least_float32(grads))
        direction, residual = conjugate_gradient(product, ascent, iterations=cg_iters)
        curvature = dot(direction, optax.tree.sub(ascent, residual))
        full = optax.tree.scale(jnp.sqrt(ratio(2 * max_kl, curvature)), direction)
        expected = dot(ascent, full)

        def step(fraction: Array) -> Params:
            return jax.tree.map(lambda p, d: (fraction * d).astype(p.dtype), params, full)

        both = (lambda params: (surrogate_fn(params), kl_fn(params))) if evaluate_fn is None else evaluate_fn
        before = both(mark_varying(params, axis_name))[0]

        def evaluate(fraction: Array) -> tuple[Scalar, Scalar]:
            new = mark_varying(optax.apply_updates(params, step(fraction)), axis_name)
            surrogate, kl = both(new)
            return sum_over_axis((surrogate - before, kl), axis_name)

        search = _line_search(evaluate, expected, max_kl, backtrack_coef, backtrack_iters, accept_ratio)
        # Minus zero is what leaves every number as it is: adding plus zero turns -0.0 into 0.0.
        updates = jax.tree.map(
            lambda d: jnp.where(search.accepted, d, jnp.asarray(-0.0, d.dtype)), step(search.fraction)
        )
        return updates, _report(search, expected, ratio(_norm(residual), _norm(ascent)))

    return optax.GradientTransformationExtraArgs(init, cast(optax.TransformUpdateExtraArgsFn, update))


class _Search(NamedTuple):
    """State of the line search: the length to try next, or the one accepted, and what it gave."""

    tries: Int[Array, ""]
    fraction: Float[Array, ""]
    accepted: Bool[Array, ""]
    kl: Float[Array, ""]
    improvement: Float[Array, ""]


def _line_search(
    evaluate: Callable[[Array], tuple[Scalar, Scalar]],
    expected: Scalar,
    max_kl: Numeric,
    backtrack_coef: Numeric,
    backtrack_iters: int,
    accept_ratio: Numeric,
) -> _Search:
    """Shortens the step until it is accepted: the first, so the longest, that is good enough."""

    def unfinished(search: _Search) -> Array:
        return ~search.accepted & (search.tries < backtrack_iters)

    def attempt(search: _Search) -> _Search:
        improvement, kl = evaluate(search.fraction)
        enough = improvement > accept_ratio * search.fraction * expected
        accepted = jnp.isfinite(improvement) & (improvement > 0) & enough & (kl <= max_kl)
        return _Search(
            jnp.where(accepted, search.tries, search.tries + 1),
            jnp.where(accepted, search.fraction, search.fraction * backtrack_coef).astype(jnp.float32),
            accepted,
            kl.astype(jnp.float32),
            improvement.astype(jnp.float32),
        )

    zero = jnp.zeros((), jnp.float32)
    start = _Search(jnp.zeros((), jnp.int32), jnp.ones((), jnp.float32), jnp.zeros((), bool), zero, zero)
    return jax.lax.while_loop(unfinished, attempt, start)


def _report(search: _Search, expected: Scalar, residual: Scalar) -> NaturalGradientState:
    return NaturalGradientState(
        kl=jnp.where(search.accepted, search.kl, 0),
        step_fraction=jnp.where(search.accepted, search.fraction, 0),
        accepted=search.accepted,
        backtracks=search.tries,
        surrogate_improvement=jnp.where(search.accepted, search.improvement, 0),
        expected_improvement=expected.astype(jnp.float32),
        cg_residual=residual.astype(jnp.float32),
    )


def _equal_categoricals(axis_name: str | None) -> FisherFunction:
    """Makes the Fisher of logits whose samples all weigh the same."""

    def fisher(logits: Any, tangents: Any) -> Array:
        if not isinstance(logits, jax.Array):
            raise ValueError(
                "fisher_fn is needed where distribution_fn returns more than one array of logits, got "
                f"{jax.tree.structure(logits)}. See jaxrl_llm.optimizers.fisher."
            )
        samples = sum_over_axis(jnp.asarray(logits.size // logits.shape[-1], jnp.float32), axis_name)
        return categorical_fisher(logits, tangents, weights=jnp.full(logits.shape[:-1], 1 / samples))

    return fisher


def _norm(tree: Params) -> Scalar:
    return jnp.sqrt(dot(tree, tree))
