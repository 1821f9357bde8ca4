"""AOT sorts the batch, of all devices: what the other losses promise of a split batch it cannot."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxrl_llm.losses import dpo_loss, dpo_weights
from jaxrl_llm.losses.preference import SORTED
from jaxrl_llm.optimizers import make_optimizer
from jaxrl_llm.reductions import combine_metrics_over_axis, sum_over_axis
from jaxrl_llm.training import init_train_state, make_train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

DEVICES, PAIRS = 4, 8
close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


def fields_of(seed):
    return np.random.default_rng(seed).normal(scale=3, size=(4, PAIRS)).astype(np.float32)


def evaluate(fields, axis_name=None, reference_free=False):
    """Computes value, metrics, and gradient of both types."""

    def loss(fields, name):
        references = [None, None] if reference_free else fields[2:]
        return dpo_loss(*fields[:2], *references, beta=0.3, loss_type=name, label_smoothing=0.1, axis_name=axis_name)

    results = {name: jax.value_and_grad(loss, has_aux=True)(fields, name) for name in SORTED}
    losses = sum_over_axis({name: value for name, ((value, _), _) in results.items()}, axis_name)
    metrics = {name: combine_metrics_over_axis(m, axis_name) for name, ((_, m), _) in results.items()}
    return losses, metrics, {name: grad for name, (_, grad) in results.items()}


EVALUATE = jax.jit(evaluate)


@given(st.integers(0, 2**16), st.permutations(range(PAIRS)), st.permutations(range(PAIRS)))
def test_the_order_of_pairs_and_for_the_unpaired_that_of_responses_changes_nothing(seed, order, other):
    fields = fields_of(seed)
    losses, metrics, grads = EVALUATE(fields)
    close(EVALUATE(fields[:, order]), (losses, metrics, {name: grad[:, order] for name, grad in grads.items()}))
    # Chosen responses in one order, rejected ones in another.
    mixed = np.stack([fields[0, order], fields[1, other], fields[2, order], fields[3, other]])
    close(EVALUATE(mixed)[0]["aot_unpaired"], losses["aot_unpaired"])


def by_pmap(fields, **options):
    pieces = np.moveaxis(fields.reshape(4, DEVICES, -1), 1, 0)
    share = functools.partial(evaluate, axis_name="data", **options)
    losses, metrics, grads = jax.pmap(share, axis_name="data", devices=jax.devices()[:DEVICES])(pieces)
    whole = {name: jnp.moveaxis(grad, 0, 1).reshape(4, -1) for name, grad in grads.items()}
    return *jax.tree.map(lambda x: x[0], (losses, metrics)), whole


def by_shard_map(fields, check_vma, **options):
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:DEVICES])
    specs = {"in_specs": P(None, "data"), "out_specs": (P(), P(), P(None, "data"))}
    share = functools.partial(evaluate, axis_name="data", **options)
    return jax.jit(jax.shard_map(share, mesh=mesh, check_vma=check_vma, **specs))(fields)


SHARDED = {
    "pmap": by_pmap,
    "shard_map": functools.partial(by_shard_map, check_vma=True),
    "shard_map_unchecked": functools.partial(by_shard_map, check_vma=False),
}


@pytest.mark.parametrize("form", SHARDED)
def test_devices_sort_the_batch_of_all(form):
    fields = fields_of(1)
    whole = EVALUATE(fields)
    close(SHARDED[form](fields), whole)
    # The test can fail: each device by itself has another loss.
    alone = np.mean([EVALUATE(part)[0]["aot"] for part in np.split(fields, DEVICES, axis=1)])
    assert abs(alone - whole[0]["aot"]) > 1e-2


@pytest.mark.parametrize("form", SHARDED)
def test_devices_sort_without_a_reference_too(form):
    fields = fields_of(2)
    close(SHARDED[form](fields, reference_free=True), jax.jit(functools.partial(evaluate, reference_free=True))(fields))


@pytest.mark.parametrize("name", SORTED)
@pytest.mark.parametrize("option", ["weights", "pair_weights"])
def test_weights_are_refused(name, option):
    with pytest.raises(ValueError, match=r"sorts the whole batch: it takes no weights and no pair_weights"):
        dpo_loss(*jnp.zeros((4, 2)), beta=0.1, loss_type=("sigmoid", name), **{option: jnp.ones(2) / 2})


def test_microbatches_are_refused():
    params, optimizer = {"shift": jnp.zeros(())}, make_optimizer("sgd", learning_rate=0.1)

    def loss_fn(params, batch, key):
        chosen, *others = (batch["fields"][:, i] for i in range(4))
        return dpo_loss(chosen + params["shift"], *others, beta=0.3, loss_type="aot", weights=batch.get("weights"))

    def weights_fn(batch, axis_name):
        return dpo_weights(jnp.ones(len(batch["fields"])), axis_name=axis_name).rows

    batch, key = {"fields": jnp.asarray(fields_of(0).T)}, jax.random.key(0)
    state = init_train_state(params, optimizer)
    whole = make_train_step(loss_fn, optimizer)
    assert jax.jit(whole)(state, batch, key)[1]["grad_norm"] > 0
    with pytest.raises(ValueError, match="num_microbatches=2 needs weights_fn"):
        make_train_step(loss_fn, optimizer, num_microbatches=2)
    split = make_train_step(loss_fn, optimizer, weights_fn=weights_fn, num_microbatches=2)
    with pytest.raises(ValueError, match="sorts the whole batch"):
        split(state, batch, key)
