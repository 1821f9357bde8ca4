import os
import signal
import subprocess
import sys
from collections import namedtuple
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl_llm.training import checkpoints


class State(NamedTuple):
    params: dict
    opt_state: tuple
    step: jax.Array


def make_state(width=3, optimizer=None):
    kernel = jax.random.normal(jax.random.key(width), (2, width))
    params = {"layer": {"kernel": kernel, "scale": jnp.ones(width, jnp.bfloat16)}}
    optimizer = optimizer or optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return State(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def assert_bitwise_equal(actual, expected):
    chex.assert_trees_all_equal_structs(actual, expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_restored_training_state_is_bitwise_equal_and_carries_extra(tmp_path):
    state = make_state()
    checkpoints.save(tmp_path, 7, state, extra={"epoch": 2, "config": {"seed": 0}})
    step, restored, extra = checkpoints.restore(tmp_path, jax.tree.map(jnp.zeros_like, state))
    assert step == 7
    assert extra == {"epoch": 2, "config": {"seed": 0}}
    assert_bitwise_equal(restored, state)


def test_every_kind_of_number_survives_bitwise(tmp_path):
    state = {
        "special": jnp.array([jnp.nan, -0.0, jnp.inf, 1e-45]),
        "low": [jnp.array([0.1, jnp.nan], jnp.bfloat16), jnp.ones(3, jnp.float8_e4m3fn), jnp.array([7, -8], jnp.int4)],
        "flags": jnp.array([True, False]),
        "empty": jnp.zeros((0, 3)),
        "nothing": None,
        "host": (np.arange(3, dtype=np.int64), np.float32(0.1)),
        "with/slash.and.dot": jnp.arange(2),
    }
    checkpoints.save(tmp_path, 0, state)
    restored = checkpoints.restore(tmp_path, state).state
    assert_bitwise_equal(restored, state)
    assert isinstance(restored["host"][0], np.ndarray)
    assert isinstance(restored["host"][1], np.float32)


def test_python_numbers_come_back_as_python_numbers(tmp_path):
    state = {"epoch": 3, "best": 0.1, "done": True}
    checkpoints.save(tmp_path, 0, state)
    restored = checkpoints.restore(tmp_path, state).state
    assert restored == state
    assert {name: type(value) for name, value in restored.items()} == {"epoch": int, "best": float, "done": bool}


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_typed_keys_come_back_as_keys_of_the_same_implementation(tmp_path, impl):
    state = {"key": jax.random.key(1, impl=impl), "keys": jax.random.split(jax.random.key(2, impl=impl), 3)}
    checkpoints.save(tmp_path, 0, state)
    restored = checkpoints.restore(tmp_path, jax.eval_shape(lambda: state)).state
    assert restored["key"].dtype == state["key"].dtype
    assert jax.random.bits(restored["key"]) == jax.random.bits(state["key"])
    np.testing.assert_array_equal(jax.random.key_data(restored["keys"]), jax.random.key_data(state["keys"]))


def test_a_state_without_any_data_can_be_saved(tmp_path):
    state = {"empty": jnp.zeros((0, 2)), "none": None}
    checkpoints.save(tmp_path, 1, state)
    assert_bitwise_equal(checkpoints.restore(tmp_path, state).state, state)


def test_shapes_from_eval_shape_are_enough_to_restore(tmp_path):
    state = make_state()
    checkpoints.save(tmp_path, 0, state)
    assert_bitwise_equal(checkpoints.restore(tmp_path, jax.eval_shape(make_state)).state, state)


def test_sharded_arrays_can_be_restored_onto_other_devices(tmp_path):
    def place(devices, spec):
        return NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("data",)), spec)

    values = jnp.arange(16.0).reshape(8, 2)
    keys = jax.random.split(jax.random.key(0), 8)
    saved_on, restored_on = place(4, PartitionSpec("data")), place(8, PartitionSpec("data"))
    checkpoints.save(tmp_path, 0, jax.device_put({"values": values, "keys": keys}, saved_on))
    like = {"values": values, "keys": jax.random.split(jax.random.key(1), 8)}
    restored = checkpoints.restore(tmp_path, jax.device_put(like, restored_on)).state
    assert restored["values"].sharding == restored_on
    assert restored["keys"].sharding.is_equivalent_to(restored_on, 1)
    np.testing.assert_array_equal(restored["values"], values)
    np.testing.assert_array_equal(jax.random.key_data(restored["keys"]), jax.random.key_data(keys))


def test_an_uncommitted_array_stays_uncommitted_so_that_it_can_meet_sharded_ones(tmp_path):
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    state = {"spread": jax.device_put(jnp.arange(8.0), sharding), "scalar": jnp.float32(2.0)}
    checkpoints.save(tmp_path, 0, state)
    restored = checkpoints.restore(tmp_path, state).state
    np.testing.assert_array_equal(restored["spread"] * restored["scalar"], 2.0 * np.arange(8.0))


def test_training_resumed_from_a_checkpoint_equals_training_without_a_break(tmp_path):
    optimizer = optax.adam(1e-2)

    @jax.jit
    def train_step(state, key):
        noise = jax.random.normal(jax.random.fold_in(key, state.step), (2, 3))
        grads = jax.grad(lambda p: jnp.sum((p["layer"]["kernel"] - noise) ** 2))(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state)
        return State(optax.apply_updates(state.params, updates), opt_state, state.step + 1)

    state = make_state(optimizer=optimizer)
    for step in range(6):
        if step == 3:
            checkpoints.save(tmp_path, step, state)
        state = train_step(state, jax.random.key(0))
    resumed = checkpoints.restore(tmp_path, make_state(optimizer=optimizer)).state
    for _ in range(3):
        resumed = train_step(resumed, jax.random.key(0))
    assert_bitwise_equal(resumed, state)


def test_only_the_newest_checkpoints_are_kept_and_each_can_be_chosen(tmp_path):
    for step in (1, 2, 3, 10):
        checkpoints.save(tmp_path, step, {"x": jnp.float32(step)}, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "2", "3"]
    assert checkpoints.latest_step(tmp_path) == 10
    assert checkpoints.restore(tmp_path, {"x": jnp.float32(0)}, step=2).state["x"] == 2


def test_saving_an_earlier_step_discards_the_abandoned_later_ones(tmp_path):
    for step, value in ((1, 1.0), (5, 5.0), (9, 9.0), (5, 50.0)):
        checkpoints.save(tmp_path, step, {"x": jnp.float32(value)}, keep=5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "5"]
    assert checkpoints.restore(tmp_path, {"x": jnp.float32(0)}).state["x"] == 50


def test_latest_step_of_a_folder_without_checkpoints_is_none(tmp_path):
    assert checkpoints.latest_step(tmp_path / "missing") is None
    assert checkpoints.latest_step(tmp_path) is None
    assert not (tmp_path / "missing").exists()


# The audit hook kills the process at a chosen moment of the second save: at the first file that it opens for it, or at
# the rename that would make it complete.
KILLED_WHILE_SAVING = """
import os, signal, sys
import jax.numpy as jnp
from jaxrl_llm.training import checkpoints

def kill(event, arguments):
    if event == sys.argv[2] and "/2.orbax-checkpoint-tmp" in str(arguments[0]):
        os.kill(os.getpid(), signal.SIGKILL)

checkpoints.save(sys.argv[1], 1, {"x": jnp.float32(1)}, keep=1)
sys.addaudithook(kill)
checkpoints.save(sys.argv[1], 2, {"x": jnp.float32(2)}, keep=1)
"""


@pytest.mark.parametrize("moment", ["open", "os.rename"])
def test_a_process_killed_while_saving_leaves_the_older_checkpoint_usable(tmp_path, moment):
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path), moment]
    assert subprocess.run(command, env=os.environ, timeout=60).returncode == -signal.SIGKILL
    assert any(path.name.startswith("2.orbax-checkpoint-tmp") for path in tmp_path.iterdir())
    assert checkpoints.restore(tmp_path, {"x": jnp.float32(0)}) == (1, {"x": 1.0}, {})
    checkpoints.save(tmp_path, 2, {"x": jnp.float32(3)}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    assert checkpoints.restore(tmp_path, {"x": jnp.float32(0)}).state == {"x": 3.0}


def test_a_changed_model_size_is_reported_by_leaf_and_by_option(tmp_path):
    checkpoints.save(tmp_path, 4, make_state(width=3), extra={"config": {"width": 3, "seed": 0}})
    with pytest.raises(ValueError, match="does not fit") as error:
        checkpoints.restore(tmp_path, make_state(width=5), config={"width": 5, "seed": 0})
    message = str(error.value)
    assert f"{tmp_path}/4" in message
    assert "params/layer/kernel: saved float32[2, 3], expected float32[2, 5]" in message
    assert "opt_state/1/0/mu/layer/kernel: saved float32[2, 3]" in message
    assert "width: 3 in the saved run, 5 now" in message
    assert "seed" not in message


def test_a_changed_optimizer_is_reported_by_leaf(tmp_path):
    checkpoints.save(tmp_path, 4, make_state(optimizer=optax.adam(1e-3)))
    with pytest.raises(ValueError, match=r"opt_state/0/nu/layer/kernel: saved float32\[2, 3\], expected nothing"):
        checkpoints.restore(tmp_path, make_state(optimizer=optax.sgd(1e-3, momentum=0.9)))


def test_another_dtype_is_an_error_and_not_a_silent_cast(tmp_path):
    checkpoints.save(tmp_path, 4, {"x": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"x: saved float32\[2\], expected bfloat16\[2\]"):
        checkpoints.restore(tmp_path, {"x": jnp.ones(2, jnp.bfloat16)})


def test_a_long_list_of_mismatches_is_cut(tmp_path):
    checkpoints.save(tmp_path, 4, {str(i): jnp.ones(2) for i in range(12)})
    with pytest.raises(ValueError, match="and 4 more"):
        checkpoints.restore(tmp_path, {str(i): jnp.ones(3) for i in range(12)})


def test_a_missing_checkpoint_is_named_with_what_there_is(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*missing"):
        checkpoints.restore(tmp_path / "missing", {"x": jnp.ones(2)})
    checkpoints.save(tmp_path, 4, {"x": jnp.ones(2)})
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5 .* \[4\]"):
        checkpoints.restore(tmp_path, {"x": jnp.ones(2)}, step=5)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError, match="'model/name' is a str"):
        checkpoints.save(tmp_path, 0, {"model": {"name": "gpt2"}})
    with pytest.raises(TypeError, match="extra must hold JSON"):
        checkpoints.save(tmp_path, 0, {"x": jnp.ones(2)}, extra={"path": tmp_path})
    with pytest.raises(ValueError, match="two leaves of the same path"):
        checkpoints.save(tmp_path, 0, {"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}})
    with pytest.raises(ValueError, match="got step=-1 and keep=2"):
        checkpoints.save(tmp_path, -1, {"x": jnp.ones(2)})
    with pytest.raises(ValueError, match="got step=0 and keep=0"):
        checkpoints.save(tmp_path, 0, {"x": jnp.ones(2)}, keep=0)
    assert list(tmp_path.iterdir()) == []


def test_the_containers_of_like_come_back(tmp_path):
    pair = namedtuple("pair", "a b")
    state = pair(jnp.ones(2), [jnp.zeros(1), (jnp.ones(3),)])
    checkpoints.save(tmp_path, 0, state)
    restored = checkpoints.restore(tmp_path, state).state
    assert isinstance(restored, pair)
    assert isinstance(restored.b[1], tuple)
