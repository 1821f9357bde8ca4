"""Quantised kernels: against bitsandbytes by values, against their definition, in bytes, and under adapters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import (
    GPT2,
    GPT2Config,
    LoraConfig,
    ScalarHead,
    adapt,
    dequantize,
    head_kernel,
    join_trainable,
    merge_lora,
    quantize,
    quantize_params,
    scalar_head_params,
    split_trainable,
)
from jaxrl_llm.models.quantization import NF4, Quantized
from jaxrl_llm.rollouts import generate, score_completions
from tests.models.test_lora import TOKENS, make, trained
from tests.unchecked import unchecked

METHODS = [("nf4", False), ("nf4", True), ("int8", False), ("int8", True)]


def is_quantized(leaf):
    return isinstance(leaf, Quantized)


def normal(*shape):
    return jnp.asarray(np.random.RandomState(0).normal(0, 0.02, shape), jnp.float32)


def test_the_codes_are_the_nearest_values_of_nf4():
    kernel = normal(2, 128, 48)
    quantized = quantize(kernel)
    blocks = np.asarray(kernel).reshape(2, 2, 64, 48)
    scales = np.abs(blocks).max(2)
    np.testing.assert_array_equal(quantized.scales, scales)
    nearest = np.abs(blocks[..., None] / scales[:, :, None, :, None] - np.float32(NF4)).argmin(-1).reshape(2, 128, 48)
    codes = np.asarray(quantized.codes)
    np.testing.assert_array_equal(codes & 15, nearest[:, ::2])
    np.testing.assert_array_equal(codes >> 4, nearest[:, 1::2])
    values = np.float32(NF4)[nearest].reshape(blocks.shape) * scales[:, :, None]
    np.testing.assert_allclose(dequantize(quantized), values.reshape(kernel.shape), rtol=1e-6)


def test_nf4_has_the_quantiles_of_a_normal_distribution():
    # Dettmers et al., eq. 4, as their code has it: 8 positive and 7 negative quantiles up to an offset, and 0.
    from scipy.stats import norm

    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, negative, [0.0]]))
    np.testing.assert_allclose(NF4, values / values.max(), atol=1e-6)


@pytest.mark.parametrize(("quant_type", "double"), METHODS)
def test_the_error_is_as_small_as_the_bits_allow(quant_type, double):
    # int8: a quarter of a step of s / 127, on average, and s is 2.6 standard deviations; a mean weight is 0.8 of one.
    error = {"nf4": 0.092, "int8": 0.25 * 2.6 / 127 / 0.8}[quant_type]
    kernel = normal(3, 256, 192)
    back = dequantize(quantize(kernel, quant_type, use_double_quant=double))
    assert float(jnp.abs(back - kernel).mean() / jnp.abs(kernel).mean()) < 1.02 * error + 0.002 * double


@pytest.mark.parametrize(("quant_type", "double"), METHODS)
@pytest.mark.parametrize("inputs", [1, 3, 64, 100])
def test_any_number_of_inputs_is_quantised_and_zeros_stay_zeros(inputs, quant_type, double):
    kernel = normal(2, inputs, 7).at[:, :, 3].set(0)
    quantized = quantize(kernel, quant_type, use_double_quant=double)
    assert quantized.shape == kernel.shape
    assert quantized.size == kernel.size
    back = dequantize(quantized)
    np.testing.assert_array_equal(back[:, :, 3], 0)
    assert float(jnp.abs(back - kernel).max()) < 0.2 * float(jnp.abs(kernel).max())


@pytest.mark.parametrize(("quant_type", "double"), METHODS)
def test_a_weight_takes_as_many_bits_in_memory_as_is_said(quant_type, double):
    bits = {"nf4": 4, "int8": 8}[quant_type] + (8 / 64 + 32 / 64 / 256 if double else 32 / 64)
    quantized = quantize(normal(4, 512, 512), quant_type, use_double_quant=double)
    compiled = jax.jit(lambda x: dequantize(x).sum()).lower(quantized).compile()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(quantized))
    assert {leaf.dtype.itemsize for leaf in jax.tree.leaves(quantized)} <= {1, 4}
    assert compiled.memory_analysis().argument_size_in_bytes == pytest.approx(held, abs=64)
    assert 8 * held / quantized.size == pytest.approx(bits, rel=2e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize(("quant_type", "double"), METHODS[1:3])
def test_a_quantised_model_is_the_model_with_dequantised_kernels(name, quant_type, double):
    module, params = make(name)
    quantized = quantize_params(params, quant_type, use_double_quant=double)
    plain = jax.tree.map(dequantize, quantized, is_leaf=is_quantized)
    kernels = [leaf for leaf in jax.tree.leaves(quantized, is_leaf=is_quantized) if is_quantized(leaf)]
    assert len(kernels) == (4 if name == "gpt2" else 7)
    assert quantized["token_embedding"]["embedding"] is params["token_embedding"]["embedding"]
    logits, _ = module.apply({"params": quantized}, TOKENS)
    np.testing.assert_allclose(logits, module.apply({"params": plain}, TOKENS)[0], atol=1e-5)
    head = ScalarHead(module)
    values, _ = head.apply({"params": scalar_head_params(jax.random.key(2), quantized)}, TOKENS)
    np.testing.assert_allclose(
        values, head.apply({"params": scalar_head_params(jax.random.key(2), plain)}, TOKENS)[0], atol=1e-5
    )


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_learn_beside_it_as_beside_the_dequantised_model(use_dora):
    module, params = make("gpt2")
    quantized = quantize_params(params, use_double_quant=True)
    plain = jax.tree.map(dequantize, quantized, is_leaf=is_quantized)
    config = LoraConfig(r=2, target_modules="all-linear", use_dora=use_dora)

    def logits_and_gradient(base):
        lora, frozen = split_trainable(trained(adapt(jax.random.key(1), base, config)))

        def loss(lora):
            logits, _ = module.apply({"params": join_trainable(lora, frozen)}, TOKENS)
            return (logits**2).mean(), logits

        return jax.jit(jax.grad(loss, has_aux=True))(lora)

    (ours, logits), (theirs, expected) = logits_and_gradient(quantized), logits_and_gradient(plain)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), ours, theirs)
    adapted = trained(adapt(jax.random.key(1), quantized, config))
    merged = merge_lora(adapted)
    assert not any(map(is_quantized, jax.tree.leaves(merged, is_leaf=is_quantized)))
    np.testing.assert_allclose(module.apply({"params": merged}, TOKENS)[0], expected, atol=1e-4)


def test_sampling_and_scoring_agree_on_a_quantised_model():
    module, params = make("llama")
    params = quantize_params(params)
    mask = jnp.ones((2, 3), bool)
    completions = generate(module.apply, params, jax.random.key(3), TOKENS[:, :3], mask, max_new_tokens=4)
    scored = score_completions(
        module.apply, head_kernel, params, TOKENS[:, :3], mask, completions.ids, completions.mask
    )
    np.testing.assert_allclose(completions.log_probs, scored.log_probs, atol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_the_backward_pass_keeps_no_dequantised_kernels(remat):
    module = GPT2(GPT2Config(vocab_size=64, n_positions=16, n_embd=128, n_layer=8, n_head=2, remat=remat))
    tokens = jnp.ones((1, 8), jnp.int32)
    params = jax.jit(module.init)(jax.random.key(0), tokens)["params"]

    def temporary(base):
        lora, frozen = split_trainable(adapt(jax.random.key(1), base, LoraConfig(r=2)))

        def loss(lora, frozen):
            hidden, _ = module.apply({"params": join_trainable(lora, frozen)}, tokens, output="hidden")
            return (hidden**2).sum()

        return jax.jit(jax.grad(loss)).lower(lora, frozen).compile().memory_analysis().temp_size_in_bytes

    one_layer = sum(leaf.nbytes for leaf in jax.tree.leaves(params["blocks"])) / 8
    assert temporary(quantize_params(params)) < temporary(params) + 2 * one_layer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "fp4"}, r"quant_type must be one of \('nf4', 'int8'\), got 'fp4'"),
        ({"block_size": 63}, "block_size must be even and at least 2, got 63"),
        ({"block_size": 0}, "block_size must be even and at least 2, got 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        quantize(normal(4, 4), **options)


@pytest.mark.parity
def test_codes_scales_and_values_are_those_of_bitsandbytes():
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    kernel = np.asarray(normal(192, 96))
    weight = torch.tensor(kernel.T.copy())  # torch keeps [outputs, inputs], so its blocks are of 64 inputs too
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours = quantize(jnp.asarray(kernel))
    np.testing.assert_array_equal(np.asarray(ours.scales).T.ravel(), state.absmax.numpy())
    codes = np.asarray(ours.codes)
    both = np.stack([codes & 15, codes >> 4], 1).reshape(192, 96).T.ravel()
    theirs = packed.numpy().ravel()
    np.testing.assert_array_equal(both, np.stack([theirs >> 4, theirs & 15], 1).ravel())
    np.testing.assert_allclose(dequantize(ours).T, functional.dequantize_4bit(packed, state).numpy(), atol=1e-7)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    nested = np.abs(functional.dequantize_4bit(packed, state).numpy() - kernel.T).mean()
    double = np.abs(dequantize(quantize(jnp.asarray(kernel), use_double_quant=True)) - kernel).mean()
    assert double < 1.01 * nested
