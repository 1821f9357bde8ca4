"""TRPO on small policies: against dense Fisher matrices, closed forms, and the mistakes of public implementations."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxrl_llm.divergences import categorical_kl, gaussian_kl
from jaxrl_llm.optimizers import (
    categorical_fisher,
    conjugate_gradient,
    fisher_vector_product,
    gaussian_fisher,
    natural_gradient,
    natural_gradient_metrics,
)
from jaxrl_llm.reductions import weighted_sum

close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
SAMPLES, FEATURES, HIDDEN, ACTIONS, DEVICES = 8, 3, 2, 3, 4


def make_problem(seed=0, scale=1.0, dtype=np.float32):
    """A network of one hidden layer, and samples with unequal weights that sum to one."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(scale * rng.normal(size=shape), dtype)  # noqa: E731
    params = {"hidden": draw(FEATURES, HIDDEN), "mean": draw(HIDDEN, ACTIONS), "log_std": 0.1 * draw(ACTIONS)}
    weights = rng.uniform(0.1, 1, SAMPLES)
    weights[2] = 0
    batch = {
        "x": jnp.asarray(rng.normal(size=(SAMPLES, FEATURES)), dtype),
        "action": jnp.asarray(rng.integers(ACTIONS, size=SAMPLES)),
        "advantage": jnp.asarray(rng.normal(size=SAMPLES), dtype),
        "weight": jnp.asarray(weights / weights.sum(), dtype),
    }
    return params, batch


def logits_of(params, batch):
    return jnp.tanh(batch["x"] @ params["hidden"]) @ params["mean"]


def gaussian_of(params, batch):
    mean = logits_of(params, batch)
    return mean, jnp.broadcast_to(params["log_std"], mean.shape)


def discrete(params, batch, axis_name=None):
    """What `update` needs for a categorical policy; the trees of the parameters may lack `log_std`."""
    old = logits_of(params, batch)

    def log_prob(logits):
        return jnp.take_along_axis(jax.nn.log_softmax(logits), batch["action"][:, None], axis=-1)[:, 0]

    def surrogate(params):
        ratio = jnp.exp(log_prob(logits_of(params, batch)) - log_prob(old))
        return weighted_sum(ratio * batch["advantage"], batch["weight"])

    return {
        "distribution_fn": lambda params: logits_of(params, batch),
        "fisher_fn": functools.partial(categorical_fisher, weights=batch["weight"]),
        "surrogate_fn": surrogate,
        "kl_fn": lambda params: weighted_sum(categorical_kl(old, logits_of(params, batch)), batch["weight"]),
        "axis_name": axis_name,
    }


def take_step(params, batch, max_kl=0.01, cg_damping=0.1, axis_name=None, **options):
    functions = discrete(params, batch, axis_name)
    optimizer = natural_gradient(max_kl, cg_damping=cg_damping, **options)
    share = params
    if axis_name is not None:
        share = jax.tree.map(lambda x: jax.lax.pcast(x, axis_name, to="varying"), params)
    grads = jax.grad(lambda params: -functions["surrogate_fn"](params))(share)
    grads = grads if axis_name is None else jax.lax.psum(grads, axis_name)
    updates, state = optimizer.update(grads, optimizer.init(params), params, **functions)
    return optax.apply_updates(params, updates), state


jit_step = jax.jit(take_step, static_argnames=("axis_name", "cg_iters", "backtrack_iters"))


def policy(params):
    return {name: params[name] for name in ("hidden", "mean")}


# The Fisher product

HEADS = {
    "categorical": (logits_of, categorical_fisher, categorical_kl),
    "gaussian": (gaussian_of, gaussian_fisher, lambda p, q: gaussian_kl(*p, *q)),
}


@pytest.mark.parametrize("head", HEADS)
def test_the_product_is_that_with_the_dense_fisher_and_the_hessian_of_the_kl(head):
    distribution, fisher, divergence = HEADS[head]
    with jax.enable_x64(True):
        params, batch = make_problem(dtype=np.float64)
        flat, unravel = ravel_pytree(params)
        vectors = jnp.asarray(np.random.default_rng(1).normal(size=(3, flat.size)))

        @jax.jit
        def compare(flat, vectors):
            old = distribution(unravel(flat), batch)

            def kl(flat):
                return weighted_sum(divergence(old, distribution(unravel(flat), batch)), batch["weight"])

            product = fisher_vector_product(
                lambda params: distribution(params, batch),
                functools.partial(fisher, weights=batch["weight"]),
                unravel(flat),
                damping=0.3,
            )
            products = jax.vmap(lambda v: ravel_pytree(product(unravel(v)))[0])(vectors)
            return products - 0.3 * vectors, vectors @ jax.hessian(kl)(flat)

        products, by_hessian = compare(flat, vectors)
        dense = dense_fisher(head, params, batch)
    close(products, by_hessian, rtol=1e-9, atol=1e-12)
    close(products, np.asarray(vectors) @ dense, rtol=1e-9, atol=1e-12)
    assert np.abs(products).max() > 0.01


@functools.partial(jax.jit, static_argnames="head")
def outputs_and_jacobian(head, params, batch):
    flat, unravel = ravel_pytree(params)
    return HEADS[head][0](params, batch), jax.jacrev(lambda flat: HEADS[head][0](unravel(flat), batch))(flat)


def dense_fisher(head, params, batch):
    """The mean of the score's outer product: over all actions, or by the formula for a Gaussian's outputs."""
    outputs, jacobian = outputs_and_jacobian(head, params, batch)
    weights = np.asarray(batch["weight"])
    if head == "gaussian":
        precision = np.exp(-2 * np.asarray(params["log_std"]))
        of_mean, of_log_std = map(np.asarray, jacobian)
        by_mean = np.einsum("n,a,nai,naj->ij", weights, precision, of_mean, of_mean)
        return by_mean + 2 * np.einsum("n,nai,naj->ij", weights, of_log_std, of_log_std)
    probs = np.asarray(jax.nn.softmax(outputs))
    jacobian = np.asarray(jacobian)
    scores = jacobian - np.einsum("na,nai->ni", probs, jacobian)[:, None]
    return np.einsum("n,na,nai,naj->ij", weights, probs, scores, scores)


def test_gaussian_kl_by_hand():
    # rlax's distributions_test: KL of diagonal Gaussians.
    mean, std = jnp.array([[1.0, -1.0], [0.1, -0.1]]), jnp.array([[0.1, 0.1], [0.2, 0.3]])
    other, other_std = jnp.array([[1.0, -10.0], [0.3, -0.2]]), jnp.array([[0.1, 0.1], [0.8, 0.3]])
    close(gaussian_kl(mean, jnp.log(std), other, jnp.log(other_std)), [4050.0, 1.00435], rtol=1e-5)
    np.testing.assert_array_equal(gaussian_kl(mean, std, mean, std), 0)


# Garage's cases (tests/garage/torch/optimizers/test_torch_conjugate_gradient_optimizer.py)


solve = jax.jit(lambda a, b, n: conjugate_gradient(lambda v: a @ v, b, iterations=n), static_argnums=2)


def test_conjugate_gradients_solve_garages_system():
    half = np.linspace(-np.pi, np.pi, 25).reshape(5, 5)
    matrix, target = half.T @ half, np.linspace(-np.pi, np.pi, 5)
    with jax.enable_x64(True):
        x, residual = solve(matrix, target, 5)
    close(matrix @ np.asarray(x), target, atol=1e-6)
    close(residual, 0, atol=1e-6)


def test_the_residual_is_what_remains_of_the_equation():
    rng = np.random.default_rng(0)
    half, target = rng.normal(size=(5, 5)), rng.normal(size=5)
    matrix = half.T @ half + np.eye(5)
    with jax.enable_x64(True):
        x, residual = solve(matrix, target, 2)
    close(matrix @ np.asarray(x), target - np.asarray(residual), atol=1e-9)
    assert np.abs(residual).max() > 0.01


def test_the_product_of_garages_parabola_is_a_hundred():
    # 5x² at any x has the Hessian 10: as a distance of outputs √5 x with the metric 2.
    product = fisher_vector_product(lambda x: jnp.sqrt(5.0) * x, lambda _, t: 2 * t, jnp.array(10.0))
    close(product(jnp.array(10.0)), 100)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("diagonal", [True, False])
def test_two_by_two_hessians_of_garage(seed, diagonal):
    a, b, x, y = np.random.default_rng(seed).uniform(1, 5, 4)
    hessian = np.diag([2 * a, 2 * b]) if diagonal else np.array([[6 * a * x + 2 * y, 2 * x], [2 * x, 6 * b * y + 2]])
    vector = {"x": jnp.float32(0.7), "y": jnp.float32(-1.3)}

    def metric(_, t):
        return tuple(sum(h * u for h, u in zip(row, t, strict=True)) for row in jnp.asarray(hessian, jnp.float32))

    params = {"x": jnp.float32(x), "y": jnp.float32(y)}
    found = fisher_vector_product(lambda p: (p["x"], p["y"]), metric, params)(vector)
    close([found["x"], found["y"]], hessian @ [0.7, -1.3], atol=1e-5)


@pytest.mark.parametrize("target", [[0.0, 0.0], [1.0, 0.0]])
def test_conjugate_gradients_go_on_harmlessly_after_the_solution(target):
    x, _ = conjugate_gradient(lambda v: jnp.array([2.0, 3.0]) * v, jnp.array(target), iterations=20)
    np.testing.assert_array_equal(x, np.array(target) / [2, 3])


# The step


def test_the_first_step_of_a_bandit_is_along_the_advantages():
    # Logits are the parameters: F = diag(p) − pp' and g = p (A − ⟨p, A⟩), so F⁺g = A less its mean over arms.
    logits, reward = jnp.array([0.3, -0.5, 0.9, 0.0]), jnp.array([1.0, 2.0, -0.5, 0.3])

    @jax.jit
    def step(logits):
        expected = lambda z: jnp.dot(jax.nn.softmax(z), reward)  # noqa: E731
        functions = {"surrogate_fn": expected, "kl_fn": lambda z: categorical_kl(logits, z)}
        optimizer = natural_gradient(1e-4, cg_damping=0.0)
        grads = -jax.grad(expected)(logits)
        return optimizer.update(grads, optimizer.init(logits), logits, distribution_fn=lambda z: z, **functions)

    updates, state = step(logits)
    probs, centred = np.asarray(jax.nn.softmax(logits)), np.asarray(reward - reward.mean())
    variance = probs @ centred**2 - (probs @ centred) ** 2
    close(updates, state.step_fraction * np.sqrt(2e-4 / variance) * centred, rtol=1e-4)
    close(state.kl, 1e-4 * state.step_fraction**2, rtol=0.02)
    close(state.expected_improvement, np.sqrt(2e-4 * variance), rtol=1e-4)
    assert state.accepted
    assert state.cg_residual < 1e-5


def same(found, expected, **tolerance):
    """Compares parameters and states, but for a residual that is all rounding error."""
    residuals = [state.cg_residual for _, state in (found, expected)]
    close(*residuals, rtol=1e-3, atol=1e-3)
    found, expected = ((params, state._replace(cg_residual=0)) for params, state in (found, expected))
    chex.assert_trees_all_close(found, expected, **tolerance)


@functools.cache
def many_steps():
    """Sixty-four problems at once, over sharp and flat policies and several trust regions."""
    problems = [make_problem(seed, scale=(0.3, 1.0, 4.0)[seed % 3]) for seed in range(64)]
    params, batch = jax.tree.map(lambda *x: jnp.stack(x), *[(policy(p), b) for p, b in problems])
    max_kl, damping = jnp.asarray([1e-3, 0.01, 0.1, 1.0] * 16), jnp.asarray([1e-3, 0.1] * 32)
    settings = params, batch, max_kl, damping
    return settings, jax.jit(jax.vmap(lambda *s: take_step(*s, cg_iters=12)))(*settings)


def test_no_step_leaves_the_trust_region_and_every_one_improves():
    (params, batch, max_kl, _), (new, state) = many_steps()
    functions = jax.vmap(lambda old, new, batch: (
        discrete(old, batch)["kl_fn"](new),
        discrete(old, batch)["surrogate_fn"](new) - discrete(old, batch)["surrogate_fn"](old),
    ))  # fmt: skip
    kl, improvement = jax.jit(functions)(params, new, batch)
    assert (state.kl <= max_kl).all()
    close(kl, state.kl, rtol=1e-3, atol=1e-6)
    close(improvement, state.surrogate_improvement, rtol=1e-3, atol=1e-6)
    accepted = np.asarray(state.accepted)
    assert accepted.mean() > 0.9
    assert (np.asarray(state.surrogate_improvement)[accepted] > 0).all()
    assert (np.asarray(state.backtracks)[accepted] > 0).any(), "some full steps are too long"
    assert (np.asarray(state.kl)[accepted] > 0.3 * np.asarray(max_kl)[accepted]).mean() > 0.5, "steps are not timid"


def test_a_sweep_under_vmap_equals_its_runs_one_by_one():
    settings, together = many_steps()
    for index in range(0, 64, 9):
        alone = jit_step(*jax.tree.map(lambda x, i=index: x[i], settings), cg_iters=12)
        same(alone, jax.tree.map(lambda x, i=index: x[i], together), rtol=2e-3, atol=2e-5)


def test_compiled_equals_eager():
    params, batch = make_problem(scale=0.5)
    same(take_step(policy(params), batch), jit_step(policy(params), batch), rtol=1e-4, atol=1e-6)


def test_devices_together_make_the_step_of_one():
    params, batch = make_problem(scale=0.5)
    params = policy(params)
    expected = jit_step(params, batch)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])
    step = functools.partial(take_step, axis_name="data")
    sharded = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))(params, batch)
    same(sharded, expected, rtol=1e-4, atol=1e-6)
    assert expected[1].accepted


def test_equal_weights_are_the_default_on_any_number_of_devices():
    params, batch = make_problem(scale=0.5)
    params, batch = policy(params), batch | {"weight": jnp.full(SAMPLES, 1 / SAMPLES)}

    @functools.partial(jax.pmap, axis_name="data", in_axes=(None, 0), out_axes=None, devices=jax.devices()[:DEVICES])
    def step(params, batch):
        functions = discrete(params, batch, "data")
        del functions["fisher_fn"]
        grads = jax.grad(lambda params: -functions["surrogate_fn"](params))(params)
        optimizer = natural_gradient()
        updates, state = optimizer.update(jax.lax.psum(grads, "data"), optimizer.init(params), params, **functions)
        return optax.apply_updates(params, updates), state

    pieces = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch)
    same(step(params, pieces), jit_step(params, batch), rtol=1e-4, atol=1e-6)


# Failed searches


def bits(tree):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def search(surrogate=lambda x: x.sum(), kl=lambda x: 0.0 * x.sum(), grads=-1.0, dtype=jnp.float32, **options):
    """One step from parameters with zeros of both signs, with a Fisher of 1 and no damping."""
    params = jnp.array([0.0, -0.0, 1.5, -2.25], dtype)
    optimizer = natural_gradient(**({"cg_damping": 0.0} | options))

    @jax.jit
    def step(params):
        functions = {"surrogate_fn": surrogate, "kl_fn": kl, "fisher_fn": lambda _, t: t}
        gradient = jnp.full_like(params, grads)
        updates, state = optimizer.update(
            gradient, optimizer.init(params), params, distribution_fn=lambda x: x, **functions
        )
        return optax.apply_updates(params, updates), state

    return params, *step(params)


FAILURES = {
    "the surrogate never rises": {"surrogate": lambda x: -x.sum()},
    "the surrogate stays": {"surrogate": lambda x: 0 * x.sum()},
    "the KL is too large": {"kl": lambda x: 0 * x.sum() + 0.02},
    "the KL is NaN": {"kl": lambda x: x.sum() * jnp.nan},
    "the surrogate is infinite": {"surrogate": lambda x: jnp.where(x[0] == 0, 0.0, jnp.inf)},
    "the gradient is NaN": {"grads": jnp.nan},
    "the gradient is zero": {"grads": 0.0},
    "too little is gained": {"surrogate": lambda x: 0.4 * x.sum(), "accept_ratio": 0.5},
    "the surrogate never rises, in 16 bits": {"surrogate": lambda x: -x.sum(), "dtype": jnp.bfloat16},
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_search_leaves_every_bit_of_the_parameters(failure):
    params, new, state = search(**FAILURES[failure], backtrack_iters=3)
    assert bits(new) == bits(params)
    assert not state.accepted
    assert state.backtracks == 3
    for value in (state.kl, state.step_fraction, state.surrogate_improvement):
        assert value == 0


def test_enough_gain_is_accepted():
    params, new, state = search(surrogate=lambda x: 0.6 * x.sum(), accept_ratio=0.5)
    assert state.accepted
    close(new - params, np.sqrt(0.02) / 2, rtol=1e-4)
    close(
        [state.surrogate_improvement, state.expected_improvement], [1.2 * np.sqrt(0.02), 2 * np.sqrt(0.02)], rtol=1e-4
    )


def test_metrics_are_read_from_a_chain():
    optimizer = optax.chain(optax.identity(), natural_gradient())
    metrics = natural_gradient_metrics(optimizer.init(jnp.zeros(2)))
    assert set(metrics) == {
        f"trpo/{name}"
        for name in (
            "kl", "step_fraction", "accepted", "backtracks", "surrogate_improvement", "expected_improvement", "cg_residual",
        )
    }  # fmt: skip
    assert natural_gradient_metrics(optax.adam(0.1).init(jnp.zeros(2))) == {}


# What public JAX implementations of TRPO get wrong


def direction_of(params, batch, damping=0.1):
    """The dense solution, and the parts that it is made of, in float64."""
    params, batch = jax.tree.map(np.asarray, (params, batch))
    with jax.enable_x64(True):
        params, batch = jax.tree.map(lambda x: jnp.asarray(x, float if x.dtype.kind == "f" else int), (params, batch))
        grads = np.asarray(ravel_pytree(surrogate_gradient(params, batch))[0])
        fisher = dense_fisher("categorical", params, batch)
    return np.linalg.solve(fisher + damping * np.eye(grads.size), grads), fisher, grads


@jax.jit
def surrogate_gradient(params, batch):
    return jax.grad(discrete(params, batch)["surrogate_fn"])(params)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@functools.cache
def one_step():
    params, batch = make_problem(3)
    params = policy(params)
    new, state = jit_step(params, batch, cg_iters=25)
    step = np.asarray(ravel_pytree(new)[0] - ravel_pytree(params)[0])
    return params, batch, step, state


def test_the_fisher_matrix_is_averaged_and_not_the_natural_gradients_of_samples():
    params, batch, step, state = one_step()
    exact, fisher, grads = direction_of(params, batch)
    curvature = exact @ fisher @ exact + 0.1 * exact @ exact
    # One length for all tensors, and the length itself: √(2δ / x·Ax), before the line search.
    close(step, state.step_fraction * np.sqrt(0.02 / curvature) * exact, rtol=1e-3, atol=1e-5)
    samples = [
        direction_of(params, jax.tree.map(lambda x, i=i: x[i : i + 1], batch) | {"weight": batch["weight"][i : i + 1]})
        for i in range(SAMPLES)
    ]
    close(sum(sample[2] for sample in samples), grads, atol=1e-6)
    assert cosine(step, sum(sample[0] for sample in samples)) < 0.99


def test_the_product_with_the_fisher_matrix_is_not_elementwise():
    params, batch, step, _ = one_step()
    exact, fisher, grads = direction_of(params, batch)
    assert cosine(step, exact) > 0.9999
    assert cosine(step, grads / (np.diag(fisher) + 0.1)) < 0.99


def test_logits_are_not_probabilities():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
    matrix = jax.vmap(lambda t: categorical_fisher(logits, t[None], weights=jnp.ones(1))[0])(jnp.eye(3))
    probs = np.array([0.7, 0.2, 0.1])
    close(matrix, np.diag(probs) - np.outer(probs, probs), atol=1e-7)


def test_the_step_does_not_depend_on_the_scale_of_the_gradient_but_on_max_kl():
    _, first, _ = search(grads=-1.0)
    _, larger, _ = search(grads=-7.0)
    _, further, _ = search(grads=-1.0, max_kl=0.04)
    params = np.array([0.0, 0.0, 1.5, -2.25])
    close(larger, first)
    close(further - params, 2 * (first - params), rtol=1e-4)
    close(0.5 * np.sum((first - params) ** 2), 0.01, rtol=1e-4)


def test_the_longest_acceptable_step_is_taken_and_not_the_last():
    limit = 2 * np.sqrt(0.02) * 0.5**2 * 1.01  # of the sum: two halvings are needed, and more would do too
    start = 1.5 - 2.25
    _, new, state = search(
        kl=lambda x: jnp.where(x.sum() - start > limit, 1.0, 0.005), backtrack_coef=0.5, backtrack_iters=10
    )
    assert state.backtracks == 2
    assert state.step_fraction == 0.25
    close(new.sum() - start, 2 * np.sqrt(0.02) * 0.25, rtol=1e-4)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: natural_gradient(cg_iters=0), "cg_iters must be at least 1, got 0"),
        (lambda: natural_gradient(backtrack_iters=0), "backtrack_iters must be at least 1, got 0"),
        (lambda: update_without(params=None), r"needs the parameters: call update\(grads, state, params"),
        (lambda: update_without(distribution_fn=lambda x: (x, x)), "fisher_fn is needed where distribution_fn returns"),
    ],
)
def test_errors_name_the_argument_and_the_cure(attempt, message):
    with pytest.raises(ValueError, match=message):
        attempt()


def update_without(params=jnp.zeros(2), distribution_fn=lambda x: x):  # noqa: B008
    functions = {"surrogate_fn": jnp.sum, "kl_fn": jnp.sum}
    optimizer = natural_gradient()
    return optimizer.update(jnp.ones(2), optimizer.init(params), params, distribution_fn=distribution_fn, **functions)


def test_a_state_can_be_given_away_no_memory_twice():
    state = natural_gradient().init(jnp.zeros(2))
    jax.block_until_ready(jax.jit(lambda state: jax.tree.map(jnp.zeros_like, state), donate_argnums=0)(state))
