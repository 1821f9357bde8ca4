"""The Llama family against torch's numbers, under every way of padding, packing and caching, and against itself."""

import functools
import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import Llama, LlamaConfig, RopeScaling, attention, from_pretrained, head_kernel
from jaxrl_llm.models.llama import rotary_frequencies
from jaxrl_llm.models.llama_checkpoint import config_from_json, config_to_json
from jaxrl_llm.rollouts import generate

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ["llama2", "llama3", "smollm2", "qwen2", "qwen3"]
SMALL = {
    "vocab_size": 13,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}


@functools.cache
def load(name="llama3", **settings):
    """Module, parameters, and the tokens, mask and logits that torch computed: rows of 20, 11 and 3, left-padded."""
    module, params, _ = from_pretrained(GOLDEN / name, **settings)
    return module, params, dict(np.load(GOLDEN / name / "golden.npz"))


@functools.cache
def compiled(module):
    """One program for every padding and packing: mask and segments are always given."""
    return jax.jit(
        lambda params, tokens, mask, segment_ids: module.apply(
            {"params": params}, tokens, mask=mask, segment_ids=segment_ids
        )[0]
    )


def logits_of(module, params, tokens, mask, segment_ids=None):
    segment_ids = np.ones(tokens.shape, int) if segment_ids is None else segment_ids
    return np.asarray(compiled(module)(params, jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(segment_ids)))


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers_in_torch(name):
    module, params, golden = load(name)
    mask = golden["mask"]
    logits = logits_of(module, params, golden["tokens"], mask)
    np.testing.assert_allclose(logits[mask], golden["logits"][mask], atol=1e-4, rtol=0)
    assert np.isfinite(logits).all()


def test_right_padding_and_padding_within_give_the_numbers_of_torch_too():
    module, params, golden = load()
    for place in (slice(0, 11), slice(4, 15), [0, 1, 2, 5, 6, 7, 8, 12, 13, 14, 19]):
        tokens, mask = np.full((3, 20), -1), np.zeros((3, 20), bool)
        tokens[1, place], mask[1, place] = golden["tokens"][1, 9:], True
        logits = logits_of(module, params, tokens, mask)
        np.testing.assert_allclose(logits[1, place], golden["logits"][1, 9:], atol=1e-4, rtol=0)
        assert np.isfinite(logits).all()


def test_packed_sequences_have_the_numbers_of_torch_for_each_alone():
    module, params, golden = load()
    tokens, segments = np.full((3, 20), -1), np.zeros((3, 20), int)
    tokens[0], segments[0] = golden["tokens"][0], 7
    tokens[1, :11], segments[1, :11] = golden["tokens"][1, 9:], 2
    tokens[1, 11:14], segments[1, 11:14] = golden["tokens"][2, 17:], 9
    logits = logits_of(module, params, tokens, np.ones((3, 20), bool), segments)
    for found, expected in (
        (logits[0], golden["logits"][0]),
        (logits[1, :11], golden["logits"][1, 9:]),
        (logits[1, 11:14], golden["logits"][2, 17:]),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


@functools.cache
def compiled_decode(module):
    def step(params, tokens, mask, cache):
        return module.apply({"params": params}, tokens, mask=mask, cache=cache)

    return jax.jit(step, static_argnums=3), jax.jit(step)


@pytest.mark.parametrize("chunks", [(20,), (18, 1, 1), (10, 10)], ids=str)
def test_decoding_with_a_cache_has_the_numbers_of_torch_for_every_split(chunks):
    module, params, golden = load()
    tokens, mask = jnp.asarray(golden["tokens"]), jnp.asarray(golden["mask"])
    prefill, step = compiled_decode(module)
    stops = np.cumsum(chunks)
    outputs, cache = prefill(params, tokens[:, : stops[0]], mask[:, : stops[0]], 21)
    for start, stop in itertools.pairwise(stops):
        logits, cache = step(params, tokens[:, start:stop], mask[:, start:stop], cache)
        outputs = np.concatenate([outputs, logits], axis=1)
    real = golden["mask"]
    np.testing.assert_allclose(np.asarray(outputs)[real], golden["logits"][real], atol=1e-4, rtol=0)
    assert cache.keys.shape == (2, 3, 2, 21, 16), "the cache holds the key-value heads only"


def test_writing_past_the_last_slot_gives_nan_and_not_wrong_numbers():
    module, params, golden = load()
    tokens, mask = jnp.asarray(golden["tokens"]), jnp.asarray(golden["mask"])
    prefill, step = compiled_decode(module)
    _, cache = prefill(params, tokens[:, :18], mask[:, :18], 21)
    for _ in range(3):
        logits, cache = step(params, tokens[:, :1], jnp.ones((3, 1), bool), cache)
        assert np.isfinite(logits).all()
    assert np.isnan(step(params, tokens[:, :1], jnp.ones((3, 1), bool), cache)[0]).all()


def test_positions_can_be_given_and_out_of_range_they_give_nan():
    module, params, golden = load()
    tokens = jnp.asarray(golden["tokens"][:1])
    forward = jax.jit(lambda positions: module.apply({"params": params}, tokens, positions=positions)[0])
    expected = golden["logits"][:1]
    positions = np.arange(20)[None]
    np.testing.assert_allclose(forward(jnp.asarray(positions)), expected, atol=1e-4, rtol=0)
    shifted = forward(jnp.asarray(positions + 7))
    np.testing.assert_allclose(shifted, expected, atol=1e-4, rtol=0, err_msg="rotary positions are relative")
    assert not np.allclose(forward(jnp.asarray(positions * 2)), expected, atol=0.1)
    logits = forward(jnp.asarray(np.where(positions == 19, 64, positions)))
    assert np.isnan(logits[:, 19]).all()


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_greedy_sampling_writes_what_torch_writes(name):
    module, params, golden = load(name)
    completions = jax.jit(
        lambda params, ids, mask: generate(
            module.apply, params, jax.random.key(0), ids, mask, max_new_tokens=8, temperature=0.0
        )
    )(params, jnp.asarray(golden["tokens"]), jnp.asarray(golden["mask"]))
    np.testing.assert_array_equal(completions.ids, golden["greedy"])


def test_hidden_states_times_the_head_are_the_logits():
    for name in ("llama3", "smollm2"):
        module, params, golden = load(name)
        assert ("lm_head" in params) == (not module.config.tie_word_embeddings)
        tokens = jnp.asarray(golden["tokens"][:1])
        hidden, _ = jax.jit(lambda p, t, m=module: m.apply({"params": p}, t, output="hidden"))(params, tokens)
        np.testing.assert_allclose(hidden @ head_kernel(params), golden["logits"][:1], atol=1e-4, rtol=0)


@functools.cache
def gradient(**settings):
    module, params, golden = load(**settings)
    mask = golden["mask"].copy()
    mask[2] = False  # a row of padding alone
    mask = jnp.asarray(mask)

    def loss(params):
        logits, _ = module.apply({"params": params}, jnp.asarray(golden["tokens"]), mask=mask)
        return (jnp.sin(logits) * mask[..., None]).sum(), logits

    (_, logits), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return logits, grads


def test_gradients_are_finite_with_a_row_of_padding_and_remat_changes_nothing():
    logits, grads = gradient()
    assert np.isfinite(logits).all()
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    again, found = gradient(remat=True)
    np.testing.assert_allclose(again, logits, atol=1e-5, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), found, grads)


def test_bfloat16_computes_nearly_the_same_and_gives_float32_logits():
    module, params, golden = load(dtype="bfloat16")
    mask = golden["mask"]
    found, expected = logits_of(module, params, golden["tokens"], mask)[mask], golden["logits"][mask]
    assert found.dtype == np.float32
    assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_attention_dropout_is_drawn_from_the_key_and_rate_zero_is_grouped_query_attention():
    draw = np.random.RandomState(0)
    query, key, value = (jnp.asarray(draw.normal(size=(2, 5, heads, 4)), jnp.float32) for heads in (6, 2, 2))
    attend = jax.jit(functools.partial(attention.attend, query, key, value, None, is_causal=True))
    found = attend(dropout=attention.Dropout(0.0, jax.random.key(0)))
    np.testing.assert_allclose(found, attend(), atol=1e-6, rtol=1e-6)

    module, params, golden = load()
    config = module.config.with_dropout(0.5)
    assert config.attention_dropout == 0.5
    module, tokens = module.clone(config=config), jnp.asarray(golden["tokens"][:1])
    run = jax.jit(lambda key: module.apply({"params": params}, tokens, deterministic=False, rngs={"dropout": key})[0])
    first, again, other = (run(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


RELEASED = {
    "Llama-2-7B": (6_738_415_616, {}),
    "Llama-3.2-1B": (
        1_235_814_400,
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
    ),
    "Mistral-7B": (
        7_241_732_096,
        {"model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8},
    ),
    "Qwen2-0.5B": (
        494_032_768,
        {
            "model_type": "qwen2",
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_have_their_numbers_of_parameters(name):
    count, settings = RELEASED[name]
    params = jax.eval_shape(Llama(LlamaConfig(**settings)).init, jax.random.key(0), jnp.zeros((1, 1), int))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_the_tree_of_parameters_is_as_documented():
    def shapes(**settings):
        module = Llama(LlamaConfig(**SMALL, **settings))
        params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
        return jax.tree.map(lambda leaf: leaf.shape, params)

    expected = {
        "token_embedding": {"embedding": (13, 8)},
        "blocks": {
            "attention_norm": {"scale": (3, 8)},
            "query": {"kernel": (3, 8, 8)},
            "key": {"kernel": (3, 8, 4)},
            "value": {"kernel": (3, 8, 4)},
            "attention_out": {"kernel": (3, 8, 8)},
            "mlp_norm": {"scale": (3, 8)},
            "mlp_gate": {"kernel": (3, 8, 12)},
            "mlp_in": {"kernel": (3, 8, 12)},
            "mlp_out": {"kernel": (3, 12, 8)},
        },
        "final_norm": {"scale": (8,)},
        "lm_head": {"kernel": (8, 13)},
    }
    assert shapes() == expected
    qwen2, qwen3 = shapes(model_type="qwen2")["blocks"], shapes(model_type="qwen3", head_dim=6)["blocks"]
    assert (qwen2["query"]["bias"], qwen2["key"]["bias"], qwen2["value"]["bias"]) == ((3, 8), (3, 4), (3, 4))
    assert "bias" not in qwen2["attention_out"]
    assert (qwen3["query_norm"]["scale"], qwen3["key_norm"]["scale"]) == ((3, 6), (3, 6))
    assert (qwen3["query"]["kernel"], qwen3["attention_out"]["kernel"]) == ((3, 8, 24), (3, 24, 8))


def test_scaled_rotary_positions_slow_down_slow_pairs_only():
    plain = LlamaConfig(head_dim=64, rope_theta=500000.0)
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192)
    ratio = rotary_frequencies(plain) / rotary_frequencies(
        LlamaConfig(head_dim=64, rope_theta=500000.0, rope_scaling=scaling)
    )
    turns = 8192 * rotary_frequencies(plain) / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 4], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 1], 8, rtol=1e-6)
    between = ratio[(turns > 1) & (turns < 4)]
    assert len(between) > 2
    assert ((between > 1) & (between < 8)).all()
    assert (np.diff(ratio) >= -1e-5).all()


# --- config.json ------------------------------------------------------------------------------------------------------


def found_in(name, **changes):
    return json.loads((GOLDEN / name / "config.json").read_text()) | changes


def test_old_files_with_rope_theta_and_rope_scaling_say_the_same_as_new_ones():
    new = found_in("llama3")
    old = {name: value for name, value in new.items() if name != "rope_parameters"}
    scaling = dict(new["rope_parameters"])
    old["rope_theta"] = scaling.pop("rope_theta")
    assert config_from_json(old | {"rope_scaling": scaling}) == config_from_json(new)
    del new["rope_parameters"]
    assert config_from_json(new).rope_theta == config_from_json(old | {"rope_theta": 1e4}).rope_theta == 1e4


def test_where_config_json_is_silent_the_defaults_are_those_of_transformers():
    import transformers

    for model_type in ("llama", "mistral", "qwen2", "qwen3"):
        theirs = transformers.AutoConfig.for_model(model_type)
        ours = config_from_json({"model_type": model_type, "sliding_window": None})
        assert ours.head_size == (getattr(theirs, "head_dim", None) or theirs.hidden_size // 32)
        assert ours.kv_heads == theirs.num_key_value_heads
        for name in config_to_json(ours).keys() - {"model_type", "num_key_value_heads", "head_dim", "sliding_window"}:
            expected = getattr(theirs, name)
            assert config_to_json(ours)[name] == expected, (model_type, name)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn'; only 'default' and"),
        ("llama3", {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "'llama3' and lacks high_freq_factor"),
        ("llama2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5; only 1.0"),
        ("llama2", {"model_type": "mistral", "sliding_window": 8}, "sliding_window=8.* set sliding_window to null"),
        ("llama2", {"model_type": "mistral", "max_position_embeddings": 8192}, "sliding_window=4096, and"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window=8, and sliding windows are not"),
        ("llama2", {"hidden_act": "mish"}, "hidden_act must be one of gelu_new, .* got 'mish'"),
    ],
)
def test_options_that_are_not_implemented_are_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_json(found_in(name, **changes))


def test_a_window_that_the_longest_sequence_fits_into_changes_nothing(tmp_path):
    shutil.copytree(GOLDEN / "llama2", tmp_path / "model")
    found = found_in("llama2", model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=64)
    (tmp_path / "model" / "config.json").write_text(json.dumps(found))
    module, params, _ = from_pretrained(tmp_path / "model")
    assert module.config.model_type == "mistral"
    jax.tree.map(np.testing.assert_array_equal, params, load("llama2")[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "the weights do not fit the model: 9 missing .*'layers.2.input_layernorm.weight'"),
        ({"num_key_value_heads": 1}, r"k_proj.weight gives an array of shape \(16, 32\), but .* \(16, 16\)"),
        ({"model_type": "qwen2"}, "6 missing .*'layers.0.self_attn.k_proj.bias'"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from embed_tokens.weight, but tie_word_embeddings"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_config_is_refused(tmp_path, changes, message):
    shutil.copytree(GOLDEN / "llama3", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(found_in("llama3", **changes)))
    with pytest.raises(ValueError, match=message):
        from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_attention_heads": 3},
            "num_attention_heads must divide hidden_size where head_dim is None, got .*=3 and",
        ),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads, got .*=3 and .*=4"),
        ({"head_dim": 5}, "head_dim must be even, .* got 5"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"attention_dropout": 1.0}, r"attention_dropout is a probability in \[0, 1\), got 1.0"),
        ({"hidden_act": "swish2"}, "hidden_act must be one of gelu_new, .* got 'swish2'"),
        ({"attention": "cudnn"}, "attention='cudnn' needs dtype bfloat16 or float16"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**(SMALL | settings))


def test_what_transformers_could_not_hold_is_refused_on_saving():
    with pytest.raises(ValueError, match="mlp_bias=True cannot be saved with model_type='qwen3'"):
        config_to_json(LlamaConfig(**SMALL, model_type="qwen3", mlp_bias=True))


@pytest.mark.parametrize("cache", [None, 17])
def test_longer_rows_than_the_model_reads_are_refused(cache):
    module = Llama(LlamaConfig(**SMALL))
    tokens = jnp.zeros((1, 17 if cache is None else 2), int)
    with pytest.raises(ValueError, match="17 long, and the model has context_length=16"):
        jax.eval_shape(lambda: module.init(jax.random.key(0), tokens, cache=cache))
