"""Adapters against merged weights, against their definition, and through sampling and scoring."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.models import (
    GPT2,
    Adapted,
    GPT2Config,
    Llama,
    LlamaConfig,
    LoraConfig,
    ScalarHead,
    adapt,
    head_kernel,
    init_lora,
    join_trainable,
    merge_lora,
    scalar_head_params,
    split_trainable,
    unmerge_lora,
)
from jaxrl_llm.models.trees import flat_leaves
from jaxrl_llm.rollouts import generate, score_completions
from jaxrl_llm.training import init_train_state, make_train_step
from tests.unchecked import unchecked

GPT2_SIZES = {"vocab_size": 13, "n_positions": 16, "n_embd": 8, "n_layer": 3, "n_head": 2}
LLAMA_SIZES = {
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
    "remat": True,
}
TOKENS = jnp.asarray(np.random.RandomState(0).randint(0, 13, (2, 6)))


@functools.cache
def make(name):
    if name == "gpt2":
        module = GPT2(GPT2Config(**GPT2_SIZES, initializer_range=0.3).with_dropout(0.0))
    else:
        module = Llama(LlamaConfig(**LLAMA_SIZES))
    return module, jax.jit(module.init)(jax.random.key(0), TOKENS)["params"]


def trained(adapted, seed=0):
    """Adapters that matter, as training leaves them."""
    draw = np.random.RandomState(seed)
    lora = jax.tree.map(lambda x: jnp.asarray(draw.normal(0, 0.3, x.shape), x.dtype), adapted.lora)
    return dataclasses.replace(adapted, lora=lora)


@functools.cache
def compiled(module, deterministic=True):
    def forward(params, key):
        return module.apply({"params": params}, TOKENS, deterministic=deterministic, rngs={"dropout": key})[0]

    return jax.jit(forward)


def logits_of(module, params, *, deterministic=True, seed=0):
    return np.asarray(compiled(module, deterministic)(params, jax.random.key(seed)))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gpt2", LoraConfig(r=2)),
        ("gpt2", LoraConfig(r=4, lora_alpha=3, target_modules=("all-linear",), use_rslora=True)),
        ("llama", LoraConfig(r=3, target_modules=("all-linear",))),
        ("gpt2", LoraConfig(r=2, use_dora=True, bias="lora_only")),
        ("llama", LoraConfig(r=2, use_dora=True)),
        ("gpt2", LoraConfig(r=2, bias="all")),
    ],
)
def test_fresh_adapters_change_no_bit_and_trained_ones_equal_the_merged_weights(name, config):
    module, params = make(name)
    adapted = adapt(jax.random.key(1), params, config)
    plain = logits_of(module, params)
    if config.use_dora:  # norms of stacked layers and of one may differ by a rounding
        np.testing.assert_allclose(logits_of(module, adapted), plain, atol=1e-6)
    else:
        np.testing.assert_array_equal(logits_of(module, adapted), plain)
    adapted = trained(adapted)
    logits = logits_of(module, adapted)
    assert abs(logits - plain).max() > 0.1
    np.testing.assert_allclose(logits, logits_of(module, merge_lora(adapted)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_gradient_reaches_adapters_alone_and_is_that_through_the_merged_weights(name):
    module, params = make(name)
    adapted = trained(adapt(jax.random.key(1), params, LoraConfig(r=2, lora_alpha=6)))
    trainable, frozen = split_trainable(adapted)

    def loss(params):
        return jnp.sin(module.apply({"params": params}, TOKENS)[0]).sum()

    grads = jax.jit(jax.grad(lambda lora: loss(join_trainable(lora, frozen))))(trainable)
    whole = jax.jit(jax.grad(loss))(merge_lora(adapted))["blocks"]
    assert jax.tree.structure(grads) == jax.tree.structure(trainable)
    assert sorted(grads["blocks"]) == (["qkv"] if name == "gpt2" else ["query", "value"])
    for layer, found in grads["blocks"].items():
        a, b = trainable["blocks"][layer]["a"], trainable["blocks"][layer]["b"]
        kernel = whole[layer]["kernel"]
        np.testing.assert_allclose(found["a"], 3 * kernel @ b.transpose(0, 2, 1), atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(found["b"], 3 * a.transpose(0, 2, 1) @ kernel, atol=1e-4, rtol=1e-4)


def test_dora_by_its_definition_with_the_norm_as_a_constant():
    module, params = make("gpt2")
    config = LoraConfig(r=2, lora_alpha=6, target_modules=("mlp_in",), use_dora=True)
    adapted = trained(adapt(jax.random.key(1), params, config))
    pair, base = adapted.lora["blocks"]["mlp_in"], params["blocks"]["mlp_in"]["kernel"]

    def loss(kernel):
        changed = {**params["blocks"], "mlp_in": {**params["blocks"]["mlp_in"], "kernel": kernel}}
        return jnp.sin(module.apply({"params": {**params, "blocks": changed}}, TOKENS)[0]).sum()

    direction = base + 3 * pair["a"] @ pair["b"]
    norm = jnp.linalg.norm(direction, axis=1, keepdims=True)
    by_hand = jax.jit(jax.grad(lambda a, b, m: loss((base + 3 * a @ b) / norm * m[:, None]), argnums=(0, 1, 2)))
    trainable, frozen = split_trainable(adapted)

    def loss_of_adapters(lora):
        return jnp.sin(module.apply({"params": join_trainable(lora, frozen)}, TOKENS)[0]).sum()

    found = jax.jit(jax.grad(loss_of_adapters))(trainable)["blocks"]["mlp_in"]
    for name, expected in zip("abm", by_hand(pair["a"], pair["b"], pair["m"]), strict=True):
        np.testing.assert_allclose(found[name], expected, atol=1e-4, rtol=1e-3)
    # Where inputs drop out, only the change does.
    noisy = dataclasses.replace(adapted, config=dataclasses.replace(config, lora_dropout=0.5))
    assert abs(logits_of(module, noisy, deterministic=False) - logits_of(module, adapted)).max() > 0.01


@pytest.mark.parametrize(("bias", "count"), [("none", 0), ("lora_only", 1), ("all", 7)])
def test_biases_are_trained_whole_if_asked_for(bias, count):
    params = make("gpt2")[1]
    adapted = adapt(jax.random.key(1), params, LoraConfig(r=2, bias=bias))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(adapted.lora)]
    assert sum("bias" in path for path in paths) == count
    merged = merge_lora(trained(adapted))
    moved = jax.tree.map(lambda old, new: not np.array_equal(old, new), params, merged)
    assert moved["blocks"]["qkv"]["bias"] == (count > 0)
    assert moved["final_norm"]["bias"] == (count > 1)
    assert not moved["final_norm"]["scale"]


def test_several_adapters_are_trained_at_once_beside_one_base():
    module, params = make("gpt2")
    starts = [adapt(jax.random.key(seed), params, LoraConfig(r=2)) for seed in range(3)]
    frozen = split_trainable(starts[0])[1]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(start.lora for start in starts))
    optimizer = optax.adam(1e-2)

    def loss_fn(lora, batch, key):
        del key
        logits = module.apply({"params": join_trainable(lora, frozen)}, batch)[0]
        return jnp.sin(logits).sum(), {}

    step = make_train_step(loss_fn, optimizer)
    train = lambda lora, batch: step(init_train_state(lora, optimizer), batch, jax.random.key(0))  # noqa: E731
    batches = jnp.stack([TOKENS, TOKENS + 1, TOKENS + 2]) % 13
    together, _ = jax.jit(jax.vmap(train))(stack, batches)
    for index, start in enumerate(starts):
        alone, _ = jax.jit(train)(start.lora, batches[index])
        one = jax.tree.map(lambda leaf, index=index: leaf[index], together.params)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), one, alone.params)


def test_gpt2_of_124m_has_as_many_adapters_as_the_guide_says():
    module = GPT2(GPT2Config())

    def make_params(key):
        return adapt(key, module.init(key, jnp.zeros((1, 1), jnp.int32))["params"], LoraConfig(r=8))

    with jax.debug_key_reuse(False):
        adapted = jax.eval_shape(make_params, jax.random.key(0))
    count, total = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (adapted.lora, adapted))
    assert (count, total) == (294_912, 124_734_720)


def test_adapters_begin_as_those_of_peft():
    params = {"blocks": {"qkv": {"kernel": jax.ShapeDtypeStruct((2, 400, 900), jnp.float32)}}}
    pair = init_lora(jax.random.key(0), params, LoraConfig(r=16))["blocks"]["qkv"]
    bound = 400**-0.5  # torch's kaiming_uniform_ with a = √5
    assert 0.99 * bound < abs(pair["a"]).max() <= bound
    np.testing.assert_allclose(pair["a"].std(), bound / 3**0.5, rtol=0.05)
    assert not pair["b"].any()
    assert not np.array_equal(pair["a"][0], pair["a"][1])


def test_what_is_sampled_with_adapters_is_scored_alike():
    module, params = make("llama")
    adapted = trained(adapt(jax.random.key(1), params, LoraConfig(r=2)))
    prompts, mask = TOKENS[:, :3], jnp.array([[True] * 3, [False, True, True]])
    options = {"max_new_tokens": 4, "eos_id": 1, "pad_id": 0}

    @jax.jit
    def sample_and_score(params, key):
        sampled = generate(module.apply, params, key, prompts, mask, **options)
        scores = score_completions(module.apply, head_kernel, params, prompts, mask, sampled.ids, sampled.mask)
        return sampled, scores.log_probs

    sampled, scored = sample_and_score(adapted, jax.random.key(2))
    np.testing.assert_allclose(
        np.where(sampled.mask, sampled.log_probs, 0), np.where(sampled.mask, scored, 0), atol=1e-5
    )
    merged, _ = sample_and_score(merge_lora(adapted), jax.random.key(2))
    np.testing.assert_array_equal(sampled.ids, merged.ids)
    assert not np.array_equal(sampled.ids, sample_and_score(params, jax.random.key(2))[0].ids)


def test_inputs_of_adapters_drop_out_in_training_alone():
    module, params = make("gpt2")
    quiet = trained(adapt(jax.random.key(1), params, LoraConfig(r=2)))
    noisy = dataclasses.replace(quiet, config=LoraConfig(r=2, lora_dropout=0.5))
    np.testing.assert_array_equal(logits_of(module, noisy), logits_of(module, quiet))
    np.testing.assert_allclose(logits_of(module, quiet, deterministic=False), logits_of(module, quiet), atol=1e-5)
    first, second = (logits_of(module, noisy, deterministic=False, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(logits_of(module, noisy, deterministic=False), first)
    assert abs(first - second).max() > 0.1
    off = split_trainable(noisy)[1]
    np.testing.assert_array_equal(logits_of(module, off, deterministic=False), logits_of(module, params))


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ((), ["query", "value"]),
        (("query",), ["query"]),
        (("blocks/key", "mlp_out"), ["key", "mlp_out"]),
        (("blocks/mlp_.*",), ["mlp_gate", "mlp_in", "mlp_out"]),
        (("(query|key)",), ["key", "query"]),
        (("all-linear",), ["attention_out", "key", "mlp_gate", "mlp_in", "mlp_out", "query", "value"]),
    ],
)
def test_layers_are_named_by_name_path_or_expression(targets, layers):
    lora = jax.eval_shape(
        functools.partial(init_lora, config=LoraConfig(target_modules=targets)), jax.random.key(0), make("llama")[1]
    )
    assert sorted(lora["blocks"]) == layers


@pytest.mark.parametrize("target", ["c_attn", "uery", "token_embedding"])
def test_a_target_that_names_nothing_is_refused_with_the_names_there_are(target):
    message = f"names no layer with '{target}'. There are blocks/attention_out, .*blocks/qkv: give"
    with pytest.raises(ValueError, match=message):
        adapt(jax.random.key(0), make("gpt2")[1], LoraConfig(target_modules=("qkv", target)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"lora_alpha": 0.0}, "lora_alpha must be positive, got 0.0"),
        ({"lora_dropout": 1.0}, r"lora_dropout is a probability in \[0, 1\), got 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)


def test_biases_are_chosen_by_peft_s_words():
    with (
        unchecked(),
        pytest.raises(ValueError, match=r"bias must be one of \('none', 'all', 'lora_only'\), got 'some'"),
    ):
        LoraConfig(bias="some")


def test_the_scale_is_alpha_by_rank_or_by_its_root_and_one_name_or_a_list_will_do():
    assert LoraConfig(r=4, lora_alpha=6).scale == 1.5
    assert LoraConfig(r=4, lora_alpha=6, use_rslora=True).scale == 3.0
    assert hash(LoraConfig(target_modules=["qkv"])) == hash(LoraConfig(target_modules="qkv"))


@pytest.mark.parametrize("bias", ["none", "all"])
def test_unmerging_finds_the_base_again(bias):
    module, params = make("gpt2")
    config = LoraConfig(r=2, target_modules="all-linear", bias=bias)
    adapted = trained(adapt(jax.random.key(0), params, config))
    again = unmerge_lora(merge_lora(adapted), adapted.lora, config)
    assert again.lora is adapted.lora
    for path, leaf in flat_leaves(params).items():
        if path.endswith("kernel"):
            np.testing.assert_allclose(flat_leaves(again.base)[path], leaf, atol=1e-6)
    logits = [module.apply({"params": tree}, TOKENS)[0] for tree in (adapted, again)]
    np.testing.assert_allclose(*logits, atol=1e-4)
    off = [module.apply({"params": split_trainable(tree)[1]}, TOKENS)[0] for tree in (adapted, again)]
    if bias == "none":
        np.testing.assert_allclose(*off, atol=1e-4)
    with pytest.raises(ValueError, match="use_dora must be False: a magnitude replaces the norms of the base"):
        unmerge_lora(params, adapted.lora, dataclasses.replace(config, use_dora=True))


def test_splitting_shares_the_base_and_plain_parameters_are_trained_whole():
    params = make("gpt2")[1]
    adapted = adapt(jax.random.key(0), params, LoraConfig(r=2))
    trainable, frozen = split_trainable(adapted)
    assert frozen.base is params
    assert frozen.lora is None
    again = join_trainable(trainable, frozen)
    assert (again.base, again.lora, again.config) == (params, trainable, adapted.config)
    assert split_trainable(params) == (params, None)
    assert join_trainable(params, None) is params
    assert merge_lora(params) is params
    merged = merge_lora(adapted)
    assert merged["blocks"]["mlp_in"]["kernel"] is params["blocks"]["mlp_in"]["kernel"]
    assert isinstance(adapted, Adapted)


def test_a_new_scalar_head_is_trained_whole_beside_the_adapters():
    decoder, decoder_params = make("gpt2")
    module, params = ScalarHead(decoder), scalar_head_params(jax.random.key(1), decoder_params)
    adapted = adapt(jax.random.key(2), params, LoraConfig(r=2))
    np.testing.assert_array_equal(logits_of(module, adapted), logits_of(module, params))
    assert sorted(adapted.lora) == ["backbone", "score"]
    assert adapted.lora["score"]["kernel"] is not params["score"]["kernel"]
    adapted = trained(adapted)
    merged = merge_lora(adapted)
    np.testing.assert_array_equal(merged["score"]["kernel"], adapted.lora["score"]["kernel"])
    np.testing.assert_allclose(logits_of(module, adapted), logits_of(module, merged), atol=1e-5)
    np.testing.assert_array_equal(logits_of(module, split_trainable(adapted)[1]), logits_of(module, params))


def test_a_training_state_of_base_and_adapters_together_is_refused():
    with pytest.raises(TypeError, match=r"would train the base too.*split_trainable"):
        init_train_state(adapt(jax.random.key(0), make("gpt2")[1], LoraConfig(r=2)), optax.sgd(0.1))
