"""A step on a mesh is the step on one device; bytes are really divided, and what devices exchange is what they should."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxrl_llm.losses import cross_entropy_loss
from jaxrl_llm.models import GPT2, GPT2Config, Llama, LlamaConfig, LoraConfig, adapt, head_kernel, quantize_params
from jaxrl_llm.optimizers.first_order import path_name
from jaxrl_llm.reductions import token_weights
from jaxrl_llm.rollouts import generate, score_tokens
from jaxrl_llm.training import init_train_state, make_train_step
from jaxrl_llm.training.parallel import (
    local_rows,
    make_mesh,
    num_shards,
    parse_mesh,
    partition_spec,
    pmap_step,
    shard,
    shard_batch,
    shardings,
)

ROWS, TIME, VOCAB = 8, 13, 64


@functools.cache
def start(name):
    if name == "gpt2":
        module = GPT2(GPT2Config(vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=3, n_head=4))
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 16}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
        module = Llama(LlamaConfig(vocab_size=VOCAB, **sizes, **heads))
    return module, jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@functools.cache
def batch():
    draw = np.random.RandomState(0)
    lengths = draw.randint(3, TIME + 1, (ROWS, 1))
    return {"tokens": draw.randint(0, VOCAB, (ROWS, TIME)), "mask": np.arange(TIME) < lengths}


def make_step(name, optimizer, axis_name=None, num_microbatches=1):
    module, _ = start(name)

    def loss_fn(params, batch, key):
        scored = score_tokens(module.apply, head_kernel, params, batch["tokens"], batch["mask"], chunk_size=4)
        return cross_entropy_loss(scored.log_probs, batch["mask"][:, 1:], weights=batch["weights"])

    def weights_fn(batch, axis_name):
        return token_weights(batch["mask"][:, 1:], "token_mean", axis_name=axis_name)

    return make_train_step(
        loss_fn, optimizer, weights_fn=weights_fn, axis_name=axis_name, num_microbatches=num_microbatches
    )


@functools.cache
def on_one_device(name):
    """A step of plain gradient descent with rate 1: what changes is the gradient."""
    optimizer = optax.sgd(1.0)
    state = init_train_state(start(name)[1], optimizer)
    return state, *jax.jit(make_step(name, optimizer))(state, jax.tree.map(jnp.asarray, batch()), jax.random.key(0))


def on_mesh(name, mesh, optimizer, num_microbatches=1):
    state = shard(init_train_state(start(name)[1], optimizer), mesh)
    placed = (shardings(state, mesh), None)
    with jax.set_mesh(mesh):
        step = jax.jit(make_step(name, optimizer, num_microbatches=num_microbatches), out_shardings=placed)
        return state, step.lower(state, shard_batch(batch(), mesh), jax.random.key(0)).compile()


@pytest.mark.parametrize(
    ("name", "sizes", "num_microbatches"),
    [
        ("gpt2", (8, 1, 1), 1),
        ("gpt2", (1, 8, 1), 1),
        ("gpt2", (1, 1, 4), 1),
        ("llama", (2, 2, 2), 2),
        pytest.param("llama", (1, 4, 2), 1, marks=pytest.mark.slow),
        pytest.param("gpt2", (2, 2, 2), 2, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradient_on_a_mesh_are_those_of_one_device(name, sizes, num_microbatches):
    before, expected, metrics = on_one_device(name)
    mesh = make_mesh(*sizes)
    state, step = on_mesh(name, mesh, optax.sgd(1.0), num_microbatches)
    after, found = step(state, shard_batch(batch(), mesh), jax.random.key(0))
    assert float(found["loss"]) == pytest.approx(float(metrics["loss"]), abs=1e-6)
    assert float(found["grad_norm"]) == pytest.approx(float(metrics["grad_norm"]), abs=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), after.params, expected.params)
    changed = jax.tree.map(lambda x, y: not np.array_equal(x, y), after.params, before.params)
    assert all(jax.tree.leaves(changed))
    assert jax.tree.map(lambda x: x.sharding, after) == jax.tree.map(lambda x: x.sharding, state)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_fsdp_divides_the_bytes_of_parameters_and_optimizer(name):
    mesh = make_mesh(fsdp=8)
    whole = init_train_state(start(name)[1], optax.adamw(1e-3))
    state = shard(whole, mesh)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
    for device in mesh.devices.flat:
        shards = [s for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards if s.device == device]
        assert sum(s.data.nbytes for s in shards) < 1.25 * total / 8  # norms and biases are whole
    replicated = sum(
        s.data.nbytes for leaf in jax.tree.leaves(shard(whole, make_mesh(data=8))) for s in leaf.addressable_shards
    )
    assert replicated == 8 * total


def collectives(compiled, kind):
    """Sizes of the results of all collectives of a kind, those that are joined in one operation too."""
    results = re.findall(rf"= (.*?) {kind}(?:-start)?\(", compiled.as_text())
    shapes = [shape for result in results for shape in re.findall(r"\w\[([\d,]*)\]", result)]
    return [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]


def test_devices_exchange_what_they_should_and_never_gather_all_parameters_at_once():
    params = start("gpt2")[1]
    one_layer = max(leaf.size // 3 for path, leaf in jax.tree.leaves_with_path(params["blocks"]))
    embedding = params["token_embedding"]["embedding"].size
    _, data = on_mesh("gpt2", make_mesh(data=8), optax.sgd(1.0))
    once = sum(leaf.size // (3 if path[0].key == "blocks" else 1) for path, leaf in jax.tree.leaves_with_path(params))
    # All gradients, those of a layer in the loop over three.
    assert sum(collectives(data, "all-reduce")) >= once
    assert collectives(data, "all-gather") == []
    _, fsdp = on_mesh("gpt2", make_mesh(fsdp=8), optax.sgd(1.0))
    gathered = collectives(fsdp, "all-gather")
    assert len(gathered) >= 4  # each kernel of a layer
    assert max(gathered) <= max(one_layer, embedding)
    _, tensor = on_mesh("gpt2", make_mesh(tensor=4), optax.sgd(1.0))
    assert len(collectives(tensor, "all-reduce")) >= 4  # after attention and MLP, forward and backward
    assert max(collectives(tensor, "all-gather"), default=0) < one_layer


def test_greedy_samples_on_a_mesh_are_those_of_one_device():
    module, params = start("llama")
    prompts, mask = batch()["tokens"][:, :5], np.ones((ROWS, 5), bool)
    sample = jax.jit(functools.partial(generate, module.apply, max_new_tokens=6, temperature=0.0))
    expected = sample(params, jax.random.key(1), jnp.asarray(prompts), jnp.asarray(mask))
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        found = sample(shard(params, mesh), jax.random.key(1), *shard_batch((prompts, mask), mesh))
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5)


def test_pmap_gives_the_step_of_one_device():
    _, expected, metrics = on_one_device("gpt2")
    optimizer = optax.sgd(1.0)
    step = pmap_step(make_step("gpt2", optimizer, axis_name="devices"))
    state, found = step(init_train_state(start("gpt2")[1], optimizer), batch(), jax.random.key(0))
    assert float(found["loss"]) == pytest.approx(float(metrics["loss"]), abs=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), state.params, expected.params)
    with pytest.raises(ValueError, match="batch must have rows in a multiple of the 8 devices, got 7"):
        step(state, jax.tree.map(lambda x: x[:7], batch()), jax.random.key(0))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_every_matrix_has_a_rule_and_so_have_adapters_and_quantised_kernels(name, axis):
    mesh = make_mesh(**{axis: 2})
    params = start(name)[1]
    adapted = adapt(
        jax.random.key(0), quantize_params(params, use_double_quant=False), LoraConfig(target_modules="all-linear")
    )
    for tree in (params, adapted.base, adapted.lora, init_train_state(adapted.lora, optax.adam(1e-3)).opt_state):
        for path, sharding in jax.tree.leaves_with_path(shardings(tree, mesh)):
            spec, path = sharding.spec, path_name(path)
            if re.search("kernel$|codes$|token_embedding", path):
                assert axis in spec, path
            if re.search(r"norm/|final_norm|count$", path):
                assert spec == P(), path
    assert partition_spec("params/blocks/qkv/kernel", (2, 8, 8), make_mesh(1, 2, 2)) == P(None, "fsdp", "tensor")
    assert partition_spec("opt_state/0/mu/blocks/mlp_out/kernel", (2, 8, 8), make_mesh(1, 2, 2)) == P(
        None, "tensor", "fsdp"
    )
    assert partition_spec("blocks/qkv/kernel", (2, 7, 8), make_mesh(1, 2, 2)) == P(None, None, "tensor")


def test_meshes_are_read_from_text():
    assert parse_mesh("") is None
    assert dict(parse_mesh("fsdp=4,data=2").shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert num_shards(parse_mesh("data=2,fsdp=2,tensor=2")) == 4
    assert num_shards(None) == 1
    assert local_rows(8, parse_mesh("data=2,tensor=2")) == slice(0, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", "mesh must give sizes to some of data, fsdp, tensor, as in data=2,fsdp=2, got 'model=2'"),
        ("data", "mesh must give sizes to some of data, fsdp, tensor, as in data=2,fsdp=2, got 'data'"),
        ("data=2,data=2", "mesh must give sizes to some of"),
        ("data=2;fsdp=2", "mesh must give sizes to some of"),
        ("data=0", "mesh must have sizes of at least 1, got data=0, fsdp=1, tensor=1"),
        ("data=3,fsdp=3", "mesh data=3,fsdp=3,tensor=1 has 9 devices, and there are 8 in 1 processes"),
    ],
)
def test_wrong_meshes_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mesh(text)


def test_several_processes_need_a_mesh(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="mesh must be given to 2 processes, such as data=8"):
        parse_mesh("")


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="mesh divides a batch into 4 parts, which do not divide its 6 rows"):
        local_rows(6, make_mesh(2, 2))
