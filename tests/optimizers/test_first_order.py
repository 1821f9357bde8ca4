import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.optimizers import make_optimizer, make_schedule
from tests.unchecked import unchecked

close = functools.partial(np.testing.assert_allclose, rtol=1e-6)

NAMES = "adamw", "adam", "amsgrad", "sgd", "momentum", "rmsprop"
PARAMS = {
    "norm": {"scale": jnp.array([1.0, 2.0])},
    "dense": {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "bias": jnp.array([0.5, -0.5])},
}


def follow(optimizer, params, gradients):
    """Applies the optimizer to a sequence of gradients; returns the parameters after each."""

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    start = params, optimizer.init(params)
    return jax.jit(lambda start: jax.lax.scan(step, start, gradients)[1])(start)


@pytest.mark.parametrize("name", NAMES)
def test_each_optimizer_descends_a_quadratic(name):
    optimizer = make_optimizer(name, learning_rate=0.05)
    scales = jnp.array([1.0, 3.0])

    def step(carry, _):
        params, state = carry
        loss, gradient = jax.value_and_grad(lambda x: jnp.sum(scales * (x - 1) ** 2))(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), loss

    params = jnp.array([-1.0, 2.0])
    losses = jax.jit(lambda carry: jax.lax.scan(step, carry, length=100)[1])((params, optimizer.init(params)))
    assert losses[-1] < 0.01 * losses[0]


GRADIENTS = np.random.default_rng(0).normal(size=(60, 4)) * np.linspace(2, 0.05, 60)[:, None]
START = np.array([1.0, -2.0, 3.0, 0.5])


def by_formula(name, gradients=GRADIENTS, lr=0.1, decay=0.0):
    """Follows the formulas of PyTorch's documentation (torch.optim), in float64."""
    params, m, v, largest, history = START.copy(), 0.0, 0.0, 0.0, []
    for t, gradient in enumerate(gradients, start=1):
        g = gradient + (0 if name == "adamw" else decay * params)
        if name == "adamw":
            params = params - lr * decay * params
        if name in ("adam", "adamw", "amsgrad"):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            largest = np.maximum(largest, v) if name == "amsgrad" else v
            step = m / (1 - 0.9**t) / (np.sqrt(largest / (1 - 0.999**t)) + 1e-8)
        elif name == "rmsprop":
            v = 0.99 * v + 0.01 * g**2
            step = g / (np.sqrt(v) + 1e-8)
        else:
            m = 0.9 * m + g if name == "momentum" else g
            step = m
        params = params - lr * step
        history.append(params)
    return np.array(history)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "momentum", "rmsprop"])
def test_the_steps_are_those_of_torch(name, decay):
    optimizer = make_optimizer(name, learning_rate=0.1, weight_decay=decay)
    with jax.enable_x64(True):
        history = follow(optimizer, jnp.asarray(START), jnp.asarray(GRADIENTS))
    close(history, by_formula(name, decay=decay))


def test_the_adam_of_the_guide_equals_optax():
    optimizer = make_optimizer("adam", learning_rate=1e-3)
    history = follow(optimizer, jnp.array(START, jnp.float32), jnp.array(GRADIENTS))
    theta, m, v = START.copy(), np.zeros(4), np.zeros(4)
    for t, gradient in enumerate(GRADIENTS, start=1):
        m = 0.9 * m + (1 - 0.9) * gradient
        v = 0.999 * v + (1 - 0.999) * gradient**2
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
        theta = theta - 1e-3 * m_hat / (np.sqrt(v_hat) + 1e-8)
        close(history[t - 1], theta)


def test_a_hundred_adam_steps_of_a_constant_gradient_are_a_tenth():
    gradients = jnp.tile(jnp.array([0.5, -0.3, 0.8]), (100, 1))
    history = follow(make_optimizer("adam", learning_rate=1e-3), jnp.array([1.0, 2.0, 3.0]), gradients)
    close(history[-1], [0.9, 2.1, 2.9], rtol=1e-5)


def test_coupled_decay_is_rescaled_by_adam_and_decoupled_is_not():
    params, gradient = {"kernel": jnp.array([4.0, 4.0])}, {"kernel": jnp.array([[1e-3, 1.0]])}
    options = {"learning_rate": 0.1, "weight_decay": 0.01}
    coupled = follow(make_optimizer("adam", **options), params, gradient)["kernel"][0]
    decoupled = follow(make_optimizer("adamw", **options), params, gradient)["kernel"][0]
    # The first Adam step is the sign of the gradient: coupled decay only adds to the gradient, and so changes nothing.
    close(coupled, [4 - 0.1, 4 - 0.1])
    close(decoupled, [4 - 0.1 - 0.1 * 0.01 * 4] * 2)
    plain = [follow(make_optimizer(name, learning_rate=0.1), params, gradient) for name in ("adam", "adamw")]
    chex.assert_trees_all_equal(*plain)


def amsgrad_by_formula(gradients, corrected_before):
    """Takes the maximum of the second moment before its bias is corrected (torch), or after (optax)."""
    params, m, v, largest = START.copy(), 0.0, 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        correction = 1 - 0.999**t
        largest = np.maximum(largest, v / correction if corrected_before else v)
        second = largest if corrected_before else largest / correction
        params = params - 0.1 * m / (1 - 0.9**t) / (np.sqrt(second) + 1e-8)
    return params


def test_amsgrad_takes_the_maximum_of_the_corrected_moment_as_optax_does():
    with jax.enable_x64(True):
        history = follow(make_optimizer("amsgrad", learning_rate=0.1), jnp.asarray(START), jnp.asarray(GRADIENTS))
    last = np.asarray(history)[-1]
    close(last, amsgrad_by_formula(GRADIENTS, corrected_before=True))
    torch = amsgrad_by_formula(GRADIENTS, corrected_before=False)
    close(torch, by_formula("amsgrad")[-1])
    assert np.abs(last - torch).max() > 0.01


def test_amsgrad_equals_torch_where_gradients_do_not_shrink():
    constant = np.tile([1.0, -2.0, 0.5, 3.0], (20, 1))
    with jax.enable_x64(True):
        history = follow(make_optimizer("amsgrad", learning_rate=0.1), jnp.asarray(START), jnp.asarray(constant))
    close(history, by_formula("amsgrad", constant), atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_biases_and_scales_are_not_decayed(name):
    zero = jax.tree.map(lambda x: jnp.zeros((1, *x.shape)), PARAMS)
    after = follow(make_optimizer(name, learning_rate=0.1, weight_decay=0.1), PARAMS, zero)
    after = jax.tree.map(lambda x: x[0], after)
    chex.assert_trees_all_equal(after["norm"], PARAMS["norm"])
    chex.assert_trees_all_equal(after["dense"]["bias"], PARAMS["dense"]["bias"])
    kernel = PARAMS["dense"]["kernel"]
    assert (jnp.abs(after["dense"]["kernel"]) < jnp.abs(kernel)).all()
    if name == "adamw":
        close(after["dense"]["kernel"], kernel * (1 - 0.1 * 0.1))


@pytest.mark.parametrize("frozen", [("dense/kernel", "norm"), ("dense",)])
def test_frozen_subtrees_do_not_move_and_have_no_state(frozen):
    optimizer = make_optimizer("adamw", learning_rate=0.1, weight_decay=0.1, max_grad_norm=1.0, frozen=frozen)
    gradients = jax.tree.map(lambda x: jnp.full((3, *x.shape), 0.7), PARAMS)
    after = jax.tree.map(lambda x: x[-1], follow(optimizer, PARAMS, gradients))
    flat = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree.leaves_with_path(PARAMS)}
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, x in jax.tree.leaves_with_path(jax.tree.map(lambda a, b: (a != b).any(), after, PARAMS))
        if x
    }
    trained = {name for name in flat if not any(name == f or name.startswith(f + "/") for f in frozen)}
    assert moved == trained
    # Two moments for each trained parameter, and a count.
    sizes = sum(x.size for x in jax.tree.leaves(optimizer.init(PARAMS)))
    assert sizes == 2 * sum(flat[name].size for name in trained) + 1


def bytes_of(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(("name", "moments"), [("adamw", 2), ("adam", 2), ("amsgrad", 3), ("momentum", 1)])
def test_the_first_moment_alone_may_be_held_in_bfloat16(name, moments):
    whole = make_optimizer(name, learning_rate=0.1).init(PARAMS)
    short = make_optimizer(name, learning_rate=0.1, optim_state_dtype="bfloat16").init(PARAMS)
    count = sum(x.size for x in jax.tree.leaves(PARAMS))
    counters = 4 * (name != "momentum")
    assert bytes_of(whole) == 4 * count * moments + counters
    assert bytes_of(short) == 4 * count * (moments - 1) + 2 * count + counters
    halved = [x for x in jax.tree.leaves(short) if x.dtype == jnp.bfloat16]
    assert [x.shape for x in halved] == [x.shape for x in jax.tree.leaves(PARAMS)]


@pytest.mark.parametrize("name", ["adamw", "adam", "amsgrad", "momentum"])
def test_a_first_moment_in_bfloat16_learns_as_one_in_float32_does(name):
    options = {"learning_rate": 0.01, "weight_decay": 0.01}
    gradients = jnp.asarray(GRADIENTS, jnp.float32)
    whole, short = (
        np.asarray(follow(make_optimizer(name, **options, optim_state_dtype=kind), jnp.float32(START), gradients))
        for kind in (None, "bfloat16")
    )
    moved = np.abs(whole - START.astype(np.float32)).max()
    assert 0 < np.abs(short - whole).max() < 0.02 * moved


def test_a_second_moment_in_bfloat16_would_stand_still():
    kept = jnp.bfloat16(1.0)
    assert jnp.bfloat16(0.999 * kept.astype(jnp.float32)) == kept, "why optim_state_dtype leaves it alone"
    optimizer = make_optimizer("adamw", learning_rate=0.1, optim_state_dtype="bfloat16")
    params, state = jnp.ones(3), optimizer.init(jnp.ones(3))
    seconds = []
    for _ in range(2):
        state = optimizer.update(jnp.ones(3), state, params)[1]
        seconds.append(optax.tree.get(state, "nu"))
    assert seconds[0].dtype == jnp.float32
    close(seconds[1], 1 - 0.999**2, rtol=1e-4)


def test_the_gradient_is_clipped_by_its_global_norm():
    def clipped(gradient, **options):
        optimizer = make_optimizer("sgd", learning_rate=1.0, max_grad_norm=1.0, **options)
        return optimizer.update(gradient, optimizer.init(gradient), gradient)[0]

    gradient = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    chex.assert_trees_all_close(clipped(gradient), {"a": jnp.array([-0.6]), "b": jnp.array([-0.8])})
    small = {"a": jnp.array([0.3]), "b": jnp.array([0.4])}
    chex.assert_trees_all_close(clipped(small), jax.tree.map(jnp.negative, small))
    # The gradient of what is frozen is no part of the norm.
    chex.assert_trees_all_close(clipped(gradient, frozen=("a",)), {"a": jnp.array([0.0]), "b": jnp.array([-1.0])})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [2, 2, 2, 2, 2, 2, 2, 2]),
        ({"warmup_steps": 4}, [0, 0.5, 1, 1.5, 2, 2, 2, 2]),
        ({"lr_scheduler_type": "linear", "total_steps": 4}, [2, 1.5, 1, 0.5, 0, 0, 0, 0]),
        ({"lr_scheduler_type": "linear", "warmup_steps": 2, "total_steps": 6}, [0, 1, 2, 1.5, 1, 0.5, 0, 0]),
        (
            {"lr_scheduler_type": "cosine", "warmup_steps": 2, "total_steps": 6},
            [0, 1, 2, 1 + np.sqrt(0.5), 1, 1 - np.sqrt(0.5), 0, 0],
        ),
    ],
)
def test_schedules_warm_up_and_decay(options, expected):
    schedule = make_schedule(2.0, **options)
    close(jax.jit(jax.vmap(schedule))(jnp.arange(8)), expected, atol=1e-6)


def test_an_optimizer_follows_its_schedule():
    schedule = make_schedule(1.0, lr_scheduler_type="linear", warmup_steps=1, total_steps=3)
    history = follow(make_optimizer("sgd", learning_rate=schedule), jnp.zeros(1), jnp.ones((4, 1)))
    close(history[:, 0], [0, -1, -1.5, -1.5])


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_learning_rates_and_decays_may_be_traced_and_swept(kind):
    def run(rate, decay):
        schedule = make_schedule(rate, lr_scheduler_type=kind, warmup_steps=1, total_steps=5)
        optimizer = make_optimizer("adamw", learning_rate=schedule, weight_decay=decay, max_grad_norm=1.0)
        return follow(optimizer, jnp.array([1.0, -2.0]), jnp.ones((3, 2)))

    rates, decays = jnp.array([0.1, 0.01]), jnp.array([0.0, 0.1])
    close(jax.jit(jax.vmap(run))(rates, decays), [run(*setting) for setting in zip(rates, decays, strict=True)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_optimizer("adagrad", learning_rate=0.1), r"optim must be one of .*'adamw'.*, got 'adagrad'"),
        (lambda: make_schedule(0.1, lr_scheduler_type="step"), r"lr_scheduler_type must be one of .*'cosine'.*'step'"),
        (lambda: make_schedule(0.1, lr_scheduler_type="linear"), r"'linear' needs total_steps greater .*=0, got None"),
        (
            lambda: make_schedule(0.1, lr_scheduler_type="cosine", warmup_steps=5, total_steps=5),
            r"needs total_steps greater than warmup_steps=5, got 5",
        ),
        *(
            (
                lambda name=name: make_optimizer(name, learning_rate=0.1, optim_state_dtype="bfloat16"),
                f"optim_state_dtype must be None or 'float32' for {name}, which keeps no first moment, got 'bfloat16'",
            )
            for name in ("sgd", "rmsprop")
        ),
        (
            lambda: make_optimizer(learning_rate=0.1, frozen=["dens", "norm"]).init(PARAMS),
            r"frozen names no parameters: \['dens'\]\. Paths look like \['dense/bias', 'dense/kernel'",
        ),
    ],
)
def test_errors_name_the_argument_and_the_cure(make, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        make()
