"""GPT-2 against a plain implementation that takes the same tree, against torch's numbers, and against itself."""

import functools
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.models import GPT2, GPT2Config, attention, decoder, from_pretrained, head_kernel

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"vocab_size": 13, "n_positions": 16, "n_embd": 8, "n_layer": 3, "n_head": 2}
UNTIED = {"tie_word_embeddings": False}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


@functools.cache
def make(**settings):
    """A small model whose every parameter matters: biases and norms are random too, and weights are not small."""
    module = GPT2(GPT2Config(**(SMALL | settings)))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    draw = np.random.RandomState(0)

    def random_leaf(path, leaf):
        return jnp.asarray(draw.normal(path[-1].key == "scale", 0.3, leaf.shape), jnp.float32)

    return module, jax.tree_util.tree_map_with_path(random_leaf, shapes)


@functools.cache
def compiled(module):
    def forward(params, tokens, **arguments):
        return module.apply({"params": params}, tokens, **arguments)

    return jax.jit(forward, static_argnames=("output", "deterministic"))


def logits_of(module, params, tokens, **arguments):
    return compiled(module)(params, tokens, **arguments)[0]


@functools.cache
def compiled_gradient(module, deterministic):
    def loss(params, tokens, mask, key):
        arguments = {"mask": mask, "deterministic": deterministic, "rngs": {"dropout": key}}
        logits, _ = module.apply({"params": params}, tokens, **arguments)
        return (jnp.sin(logits) * mask[..., None]).sum(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def gradient(module, params, tokens, mask=None, *, deterministic=True):
    """Logits, and the gradient of a loss of all of them that count."""
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask
    (_, logits), grads = compiled_gradient(module, deterministic)(params, tokens, mask, jax.random.key(3))
    return logits, grads


def random_tokens(*shape, seed=0):
    return jnp.asarray(np.random.RandomState(seed).randint(0, SMALL["vocab_size"], shape))


def reference_logits(params, tokens, real, segments, *, config):
    """The model written out with loops over rows, layers, heads and tokens, and no Flax: slow, and easy to check."""

    def norm(x, weights):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.layer_norm_epsilon)
        return x * weights["scale"][None] + weights["bias"][None]

    def linear(x, weights):
        return x @ weights["kernel"] + weights["bias"][None]

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def attend(query, key, value, visible):
        scores = query @ key[visible].T / np.sqrt(len(query))
        weights = np.exp(scores - scores.max())
        return weights / weights.sum() @ value[visible]

    def row_logits(tokens, real, segments):
        time, width = len(tokens), config.n_embd // config.n_head
        earlier = [[s for s in range(t) if real[s] and segments[s] == segments[t]] for t in range(time)]
        x = np.stack(
            [
                params["token_embedding"]["embedding"][tokens[t]]
                + params["position_embedding"]["embedding"][len(earlier[t])]
                for t in range(time)
            ]
        )
        for layer in range(config.n_layer):
            block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["blocks"])
            qkv = linear(norm(x, block["attention_norm"]), block["qkv"])
            query, key, value = qkv.reshape(time, 3, config.n_head, width).transpose(1, 2, 0, 3)
            mixed = [
                [attend(query[h, t], key[h], value[h], [*earlier[t], t]) for h in range(config.n_head)]
                for t in range(time)
            ]
            x = x + linear(np.array(mixed).reshape(time, -1), block["attention_out"])
            x = x + linear(gelu(linear(norm(x, block["mlp_norm"]), block["mlp_in"])), block["mlp_out"])
        head = params["lm_head"]["kernel"] if "lm_head" in params else params["token_embedding"]["embedding"].T
        return norm(x, params["final_norm"]) @ head

    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    rows = zip(np.asarray(tokens), np.asarray(real), np.asarray(segments), strict=True)
    return np.stack([row_logits(*row) for row in rows])


REAL = np.array([[1] * 8, [0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1, 1, 0]], bool)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 2], [0, 0, 0, 3, 3, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize(
    ("settings", "mask", "segment_ids"),
    [({}, None, None), ({}, REAL, None), ({}, REAL, SEGMENTS), (UNTIED | {"n_inner": 5}, None, SEGMENTS)],
    ids=["plain", "padded", "padded and packed", "untied and packed"],
)
def test_the_model_equals_a_plain_implementation_on_the_same_tree(settings, mask, segment_ids):
    module, params = make(**settings)
    tokens = random_tokens(3, 8)
    segments = np.ones((3, 8), int) if segment_ids is None else segment_ids
    real = (segments > 0) & (True if mask is None else mask)
    arguments = {"mask": mask, "segment_ids": segment_ids}
    arrays = {name: jnp.asarray(array) for name, array in arguments.items() if array is not None}
    logits = np.asarray(logits_of(module, params, tokens, **arrays))
    expected = reference_logits(params, tokens, real, segments, config=module.config)
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2_tied", "gpt2_untied", "gpt2_shallow"])
def test_logits_equal_those_of_transformers_in_torch(name):
    module, params, _ = from_pretrained(GOLDEN / name)
    golden = np.load(GOLDEN / name / "golden.npz")
    tokens, mask = jnp.asarray(golden["tokens"]), jnp.asarray(golden["mask"])
    logits = np.asarray(logits_of(module, params, tokens, mask=mask))
    np.testing.assert_allclose(logits[golden["mask"]], golden["logits"][golden["mask"]], atol=1e-4, rtol=0)


@given(
    left=st.integers(0, 3),
    length=st.sampled_from([1, 4]),
    pad=st.sampled_from([0, 7, -1, 13, 2**31 - 1]),
    seed=st.integers(0, 99),
)
def test_padding_never_changes_the_logits_of_real_tokens(left, length, pad, seed):
    module, params = make()
    alone = random_tokens(1, length, seed=seed)
    padded, mask = np.full((1, 8), pad), np.zeros((1, 8), bool)
    padded[:, left : left + length], mask[:, left : left + length] = alone, True
    logits = logits_of(module, params, jnp.asarray(padded), mask=jnp.asarray(mask))
    np.testing.assert_allclose(logits[:, left : left + length], logits_of(module, params, alone), atol=1e-5, rtol=1e-5)
    assert np.isfinite(logits).all()


def test_padding_never_changes_the_gradient():
    module, params = make()
    tokens = random_tokens(2, 8)
    padded = np.full((2, 11), -1)
    padded[0, 3:], padded[1, :8] = tokens
    _, expected = gradient(module, params, tokens)
    _, found = gradient(module, params, jnp.asarray(padded), jnp.asarray(padded != -1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), found, expected)


def test_packed_rows_equal_their_sequences_alone():
    module, params = make()
    sequences = [random_tokens(1, length, seed=length) for length in (3, 1, 5)]
    packed = jnp.asarray(np.concatenate([*sequences, np.full((1, 3), -1)], axis=1))
    segment_ids = jnp.array([[4, 4, 4, 2, 9, 9, 9, 9, 9, 0, 0, 0]])
    logits = logits_of(module, params, packed, segment_ids=segment_ids)
    assert np.isfinite(logits).all()
    alone = np.concatenate([logits_of(module, params, sequence) for sequence in sequences], axis=1)
    np.testing.assert_allclose(logits[:, :9], alone, atol=1e-5, rtol=1e-5)


def test_later_tokens_never_change_earlier_logits():
    module, params = make()
    tokens = random_tokens(2, 8)
    changed = tokens.at[:, 5:].set((tokens[:, 5:] + 1) % SMALL["vocab_size"])
    before, after = (logits_of(module, params, x) for x in (tokens, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert not np.allclose(before[:, 5:], after[:, 5:])


@functools.cache
def compiled_decode(module):
    def step(params, tokens, mask, cache):
        return module.apply({"params": params}, tokens, mask=mask, cache=cache)

    return jax.jit(step, static_argnums=3), jax.jit(step)


SPLITS = [(first, 5 - first) for first in range(1, 5)] + [(5,), (1,) * 5, (2, 2, 1)]


@pytest.mark.parametrize("chunks", SPLITS, ids=str)
def test_decoding_with_a_cache_equals_the_full_forward_pass_for_every_split(chunks):
    module, params = make()
    tokens = random_tokens(3, 5)
    mask = jnp.array([[1] * 5, [0, 0, 0, 1, 1], [0, 1, 1, 0, 1]], bool)
    expected = np.asarray(logits_of(module, params, tokens, mask=mask))
    prefill, step = compiled_decode(module)
    stops = np.cumsum(chunks)
    outputs, cache = prefill(params, tokens[:, : stops[0]], mask[:, : stops[0]], 7)
    for start, stop in itertools.pairwise(stops):
        logits, cache = step(params, tokens[:, start:stop], mask[:, start:stop], cache)
        outputs = np.concatenate([outputs, logits], axis=1)
    real = np.asarray(mask)
    np.testing.assert_allclose(np.asarray(outputs)[real], expected[real], atol=1e-5, rtol=1e-5)
    assert int(cache.length) == 5
    np.testing.assert_array_equal(cache.mask, np.pad(real, ((0, 0), (0, 2))))


def test_an_id_or_a_position_out_of_range_gives_nan_and_not_wrong_numbers():
    module, params = make()
    logits = logits_of(module, params, random_tokens(2, 8).at[0, 0].set(13))
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1]).all()
    positions = jnp.array([[0, 1, 2, 3, 4, 5, 6, 16]] * 2)
    assert np.isnan(logits_of(module, params, random_tokens(2, 8), positions=positions)[:, 7]).all()


def test_explicit_positions_replace_the_count():
    module, params = make()
    tokens, counted = random_tokens(2, 8), jnp.array([[0, 1, 2, 3, 4, 5, 6, 7]] * 2)
    expected = logits_of(module, params, tokens)
    np.testing.assert_array_equal(logits_of(module, params, tokens, positions=counted), expected)
    assert not np.allclose(logits_of(module, params, tokens, positions=counted + 1), expected)


def test_writing_past_the_last_slot_gives_nan_and_not_wrong_numbers():
    module, params = make()
    prefill, step = compiled_decode(module)
    one = random_tokens(3, 1), jnp.ones((3, 1), bool)
    _, cache = prefill(params, random_tokens(3, 5), jnp.ones((3, 5), bool), 7)
    for _ in range(2):
        logits, cache = step(params, *one, cache)
        assert np.isfinite(logits).all()
    assert np.isnan(step(params, *one, cache)[0]).all()


def test_a_decoding_loop_updates_the_cache_in_place():
    module = GPT2(GPT2Config(vocab_size=16, n_positions=256, n_embd=32, n_layer=4, n_head=2))
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]

    def generate(params, tokens):
        logits, cache = module.apply({"params": params}, tokens, cache=256)

        def step(state):
            logits, cache = module.apply({"params": params}, state[0], cache=state[1])
            return logits[:, -1:].argmax(-1), cache

        return jax.lax.while_loop(lambda s: s[1].length < 256, step, (logits[:, -1:].argmax(-1), cache))[0]

    program = jax.jit(generate).lower(params, jnp.zeros((8, 4), int)).compile()
    cache_bytes = 2 * 4 * 8 * 256 * 32 * 4
    memory = program.memory_analysis()
    assert cache_bytes <= memory.temp_size_in_bytes < 1.7 * cache_bytes  # one more copy would need 2


def test_hidden_states_times_the_head_are_the_logits():
    for settings in ({}, UNTIED):
        module, params = make(**settings)
        assert ("lm_head" in params) == (not module.config.tie_word_embeddings)
        hidden = logits_of(module, params, random_tokens(2, 8), output="hidden")
        assert hidden.shape == (2, 8, 8)
        logits = logits_of(module, params, random_tokens(2, 8))
        np.testing.assert_allclose(hidden @ head_kernel(params), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_what_is_recomputed_changes_nothing_and_draws_the_same_dropout_again(remat, monkeypatch):
    tokens = random_tokens(2, 8)
    module, params = make(remat=remat)
    logits, found = gradient(module, params, tokens, deterministic=False)
    monkeypatch.setattr(decoder.nn, "remat", lambda block, **options: block)
    compiled_gradient.cache_clear()
    expected_logits, expected = gradient(module, params, tokens, deterministic=False)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-5, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), found, expected)


def test_bfloat16_computes_nearly_the_same_and_keeps_float32_parameters():
    full, params = make()
    half, half_params = make(dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, params, half_params)
    tokens = random_tokens(2, 8)
    hidden, _ = jax.eval_shape(lambda: half.apply({"params": params}, tokens, output="hidden"))
    assert hidden.dtype == jnp.bfloat16
    (expected, expected_grads), (found, grads) = (gradient(module, params, tokens) for module in (full, half))
    assert found.dtype == jnp.float32
    assert 0 < np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert a.dtype == jnp.float32
        assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b)


@pytest.mark.parametrize(("dtype", "deterministic"), [("float32", True), ("float32", False), ("bfloat16", True)])
def test_a_row_of_padding_alone_gives_finite_outputs_and_gradients(dtype, deterministic):
    module, params = make(dtype=dtype)
    mask = jnp.array([[0] * 8, [0] * 5 + [1] * 3], bool)
    logits, grads = gradient(module, params, random_tokens(2, 8), mask, deterministic=deterministic)
    assert np.isfinite(logits).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_parameters_stacked_over_models_can_be_vmapped():
    module, params = make()
    other = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf) * 1.1), params)
    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), params, other)
    tokens = random_tokens(2, 8)
    both = jax.jit(jax.vmap(lambda params: module.apply({"params": params}, tokens)[0]))(stacked)
    for found, one in zip(both, (params, other), strict=True):
        np.testing.assert_allclose(found, logits_of(module, one, tokens), atol=1e-5, rtol=1e-5)


def test_dropout_is_off_by_default_and_each_kind_of_it_is_drawn_from_the_key():
    tokens = random_tokens(2, 8)
    plain = logits_of(*make(**NO_DROPOUT), tokens)
    np.testing.assert_array_equal(logits_of(*make(), tokens), plain)
    for rate in NO_DROPOUT:
        module, params = make(**(NO_DROPOUT | {rate: 0.5}))
        draws = [
            logits_of(module, params, tokens, deterministic=False, rngs={"dropout": jax.random.key(seed)})
            for seed in (0, 0, 1)
        ]
        np.testing.assert_array_equal(draws[0], draws[1])
        assert not np.allclose(draws[0], draws[2])
        assert not np.allclose(draws[0], plain)


def test_attention_dropout_is_unbiased_and_zero_rate_is_the_fused_attention():
    query, key, value = jnp.asarray(np.random.RandomState(0).normal(size=(3, 2, 5, 2, 4)), jnp.float32)
    mask = np.ones((2, 1, 5, 5), bool)
    mask[0, :, :, :2] = False
    attend = jax.jit(functools.partial(attention.attend, query, key, value, jnp.asarray(mask), is_causal=True))

    def dropped(key, rate):
        return attend(dropout=attention.Dropout(rate, key))

    expected = attend()
    np.testing.assert_allclose(dropped(jax.random.key(0), 0.0), expected, atol=1e-6, rtol=1e-6)
    draws = np.asarray(jax.vmap(dropped, (0, None))(jax.random.split(jax.random.key(1), 4000), 0.3))
    error = (draws.mean(0) - expected) / (draws.std(0) / 4000**0.5)
    assert np.abs(error).max() < 5  # standard errors
    first = draws[:, 1, 0, 0]  # the first query of a row without padding sees one key: it is dropped or scaled
    np.testing.assert_allclose((first == 0).all(-1).mean(), 0.3, atol=0.03)


@pytest.mark.parametrize(
    ("size", "count"),
    [("124M", 124_439_808), ("355M", 354_823_168), ("774M", 774_030_080), ("1.5B", 1_557_611_200)],
)
def test_the_released_sizes_have_their_numbers_of_parameters(size, count):
    module = GPT2(GPT2Config.of_size(size))
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), int))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_the_tree_of_parameters_is_as_documented():
    module = GPT2(GPT2Config(**SMALL, n_inner=5, dtype="bfloat16", tie_word_embeddings=False))
    params = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    norm = {"scale": (8,), "bias": (8,)}
    stacked_norm = {"scale": (3, 8), "bias": (3, 8)}
    assert jax.tree.map(lambda leaf: leaf.shape, params) == {
        "token_embedding": {"embedding": (13, 8)},
        "position_embedding": {"embedding": (16, 8)},
        "blocks": {
            "attention_norm": stacked_norm,
            "qkv": {"kernel": (3, 8, 24), "bias": (3, 24)},
            "attention_out": {"kernel": (3, 8, 8), "bias": (3, 8)},
            "mlp_norm": stacked_norm,
            "mlp_in": {"kernel": (3, 8, 5), "bias": (3, 5)},
            "mlp_out": {"kernel": (3, 5, 8), "bias": (3, 8)},
        },
        "final_norm": norm,
        "lm_head": {"kernel": (8, 13)},
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_fresh_weights_have_the_spread_of_the_paper():
    module = GPT2(GPT2Config(vocab_size=500, n_positions=50, n_embd=64, n_layer=2, n_head=2, initializer_range=0.1))
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    blocks = params["blocks"]
    for leaf in (params["token_embedding"]["embedding"], blocks["qkv"]["kernel"], blocks["mlp_in"]["kernel"]):
        np.testing.assert_allclose(leaf.std(), 0.1, rtol=0.03)
    for name in ("attention_out", "mlp_out"):
        np.testing.assert_allclose(blocks[name]["kernel"].std(), 0.1 / 4**0.5, rtol=0.03)
        assert not np.array_equal(blocks[name]["kernel"][0], blocks[name]["kernel"][1])


@pytest.mark.parametrize(
    ("tokens", "arguments", "message"),
    [
        (17, {}, "17 long, and the model has context_length=16"),
        (3, {"cache": 17}, "17 long, and the model has context_length=16"),
        (3, {"cache": 2}, "cache has 2 slots, fewer than the 3 tokens"),
        (3, {"cache": 4, "segment_ids": jnp.ones((1, 3), int)}, "segment_ids cannot be used with a cache"),
    ],
)
def test_a_call_that_could_only_give_wrong_numbers_is_refused(tokens, arguments, message):
    module, params = make()
    with pytest.raises(ValueError, match=message):
        module.apply({"params": params}, jnp.zeros((1, tokens), int), **arguments)


@pytest.fixture
def untyped():
    """Turns the checks of annotations off, as they are for users: then our own errors must do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_an_unknown_choice_is_refused_with_the_ones_there_are(untyped):
    module, params = make()
    with pytest.raises(ValueError, match="output must be 'logits' or 'hidden', got 'logit'"):
        module.apply({"params": params}, random_tokens(2, 8), output="logit")
    with pytest.raises(ValueError, match="attention must be None, 'xla' or 'cudnn', got 'flash'"):
        GPT2Config(attention="flash")


def test_longer_rows_are_accepted_with_positions():
    module, params = make()
    logits = logits_of(module, params, random_tokens(1, 20), positions=jnp.asarray(np.arange(20)[None] % 10))
    assert np.isfinite(logits).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_head": 3}, "n_head must divide n_embd, got n_head=3 and n_embd=8"),
        ({"n_layer": 0}, "n_layer must be at least 1, got 0"),
        ({"n_inner": 0}, "n_inner must be at least 1, got 0"),
        ({"activation_function": "swish2"}, "activation_function must be one of gelu_new, .* got 'swish2'"),
        ({"attn_pdrop": 1.0}, r"attn_pdrop is a probability in \[0, 1\), got 1.0"),
        ({"attention": "cudnn"}, "attention='cudnn' needs dtype bfloat16 or float16 .* got dtype=float32"),
        ({"attention": "cudnn", "dtype": "bfloat16"}, "multiple of 8, got .* width of 4"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GPT2Config(**(SMALL | settings))


@pytest.mark.gpu
def test_cudnn_attention_equals_xla_attention():
    settings = {"n_embd": 32, "dtype": "bfloat16"}
    (xla, params), (cudnn, _) = make(**settings, attention="xla"), make(**settings, attention="cudnn")
    mask = jnp.array([[1] * 8, [0] * 3 + [1] * 5], bool)
    (expected, expected_grads), (found, grads) = (gradient(m, params, random_tokens(2, 8), mask) for m in (xla, cudnn))
    assert np.abs(found - expected)[np.asarray(mask)].max() < 0.05 * np.abs(expected).max()
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b)


def test_on_a_cpu_a_tied_head_is_multiplied_in_the_order_of_the_embedding():
    module = GPT2(GPT2Config(vocab_size=97, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    tokens = jnp.ones((3, 1), jnp.int32)
    params = module.init(jax.random.key(0), tokens)["params"]
    text = jax.jit(lambda params: module.apply({"params": params}, tokens)[0]).lower(params).compile().as_text()
    heads = [shape for shape in re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text) if "97" in shape.split(",")]
    assert heads
    assert all(shape.startswith("97,") for shape in heads), "XLA would pack the whole embedding for each product"
