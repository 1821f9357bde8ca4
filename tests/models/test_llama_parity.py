"""The Llama family and scalar heads against transformers in torch, live: `pytest -m parity`, with the parity extra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import (
    GPT2,
    GPT2Config,
    Llama,
    LlamaConfig,
    RopeScaling,
    ScalarHead,
    from_pretrained,
    from_pretrained_reward_model,
    last_token_values,
    save_pretrained,
)

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILY = {
    "Llama 2": {"num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    "Llama 3": {"rope_theta": 5e5, "rope_scaling": RopeScaling(32.0, 1.0, 4.0, 16), "num_key_value_heads": 1},
    "Llama with biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 10},
    "SmolLM2": {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "Mistral": {"model_type": "mistral", "rope_theta": 1e6},
    "Qwen2": {"model_type": "qwen2", "rope_theta": 1e6, "tie_word_embeddings": True},
    "Qwen3": {"model_type": "qwen3", "rope_theta": 1e6, "head_dim": 16},
    "Qwen3 with biases": {"model_type": "qwen3", "attention_bias": True},
}


def randomized(module, seed=0):
    """Every parameter is random: weights of spread 0.1, gains around one."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    draw = np.random.RandomState(seed)

    def random_leaf(path, leaf):
        return jnp.asarray(draw.normal(path[-1].key == "scale", 0.1, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(random_leaf, shapes)


def inputs(lengths=(32, 19, 3)):
    """Left-padded tokens without id 0, their mask and positions."""
    mask = np.arange(32)[None] >= 32 - np.array(lengths)[:, None]
    tokens = np.where(mask, np.random.RandomState(1).randint(1, 97, mask.shape), 0)
    return tokens, mask, (mask.cumsum(1) - 1).clip(min=0)


def torch_outputs(model, tokens, mask, positions):
    assert model.dtype == torch.float32
    with torch.no_grad():
        arrays = {"attention_mask": torch.tensor(mask.astype(int)), "position_ids": torch.tensor(positions)}
        return model.eval()(torch.tensor(tokens), **arrays).logits.numpy()


@pytest.mark.parametrize("name", FAMILY)
def test_a_saved_folder_loads_in_torch_with_the_same_logits(tmp_path, name):
    from transformers import AutoModelForCausalLM

    module = Llama(LlamaConfig(**(BASE | FAMILY[name])))
    params = randomized(module)
    save_pretrained(tmp_path / "model", module, params)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    tokens, mask, positions = inputs()
    expected = torch_outputs(model, tokens, mask, positions)
    logits, _ = jax.jit(module.apply)({"params": params}, jnp.asarray(tokens), mask=jnp.asarray(mask))
    error = np.abs(np.asarray(logits) - expected)[mask].max()
    print(f"{name}: max error {error:.2e} at logits up to {np.abs(expected).max():.1f}")
    assert error < 1e-4


@pytest.mark.parametrize("name", FAMILY)
def test_what_torch_saves_loads_here_and_comes_back_bit_for_bit(tmp_path, name):
    from transformers import AutoConfig, AutoModelForCausalLM

    module = Llama(LlamaConfig(**(BASE | FAMILY[name])))
    save_pretrained(tmp_path / "first", module, randomized(module))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "first"))
    model.save_pretrained(tmp_path / "torch", max_shard_size="20KB")
    loaded, params, _ = from_pretrained(tmp_path / "torch")
    save_pretrained(tmp_path / "ours", loaded, params)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    expected = model.state_dict()
    assert again.keys() == expected.keys()
    for tensor in expected:
        assert torch.equal(again[tensor], expected[tensor]), tensor


GPT2_BASE = {"vocab_size": 97, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 4}
BACKBONES = {
    "GPT-2": GPT2(GPT2Config(**GPT2_BASE, pad_token_id=0)),
    "GPT-2 untied": GPT2(GPT2Config(**GPT2_BASE, pad_token_id=0, tie_word_embeddings=False)),
    "Llama": Llama(LlamaConfig(**BASE, pad_token_id=0)),
    "Qwen3": Llama(LlamaConfig(**BASE, pad_token_id=0, model_type="qwen3", tie_word_embeddings=True)),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_saved_reward_model_loads_in_torch_with_the_same_scores(tmp_path, name):
    from transformers import AutoModelForSequenceClassification

    module = ScalarHead(BACKBONES[name])
    params = randomized(module)
    save_pretrained(tmp_path / "model", module, params)
    model, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    assert model.config.num_labels == 1
    tokens, mask, positions = inputs()
    values, _ = jax.jit(module.apply)({"params": params}, jnp.asarray(tokens), mask=jnp.asarray(mask))
    found = last_token_values(values, jnp.asarray(mask))
    np.testing.assert_allclose(found, torch_outputs(model, tokens, mask, positions)[:, 0], atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path / "torch")
    _, again, _ = from_pretrained_reward_model(tmp_path / "torch")
    jax.tree.map(np.testing.assert_array_equal, again, params)
