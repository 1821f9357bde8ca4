"""A scalar for every token: against torch's classifiers, and from a pretrained decoder."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from jaxrl_llm.models import (
    ScalarHead,
    from_pretrained,
    from_pretrained_reward_model,
    last_token_values,
    save_pretrained,
    scalar_head_params,
)

GOLDEN = Path(__file__).parents[1] / "golden"
REWARD_MODELS = ["llama_reward", "gpt2_reward"]


@pytest.mark.parametrize("name", REWARD_MODELS)
def test_scores_equal_those_of_transformers_classifiers_in_torch_whatever_the_padding(name):
    module, params, _ = from_pretrained_reward_model(GOLDEN / name)
    golden = np.load(GOLDEN / name / "golden.npz")

    @jax.jit
    def score(tokens, mask):
        return last_token_values(module.apply({"params": params}, tokens, mask=mask)[0], mask)

    tokens, mask = golden["tokens"], golden["mask"]
    np.testing.assert_allclose(score(jnp.asarray(tokens), jnp.asarray(mask)), golden["scores"], atol=1e-4, rtol=0)
    order = np.argsort(~mask, axis=1, kind="stable")
    tokens, mask = (np.take_along_axis(array, order, axis=1) for array in (tokens, mask))
    assert mask[:, 0].all(), "now padded on the right"
    np.testing.assert_allclose(score(jnp.asarray(tokens), jnp.asarray(mask)), golden["scores"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", REWARD_MODELS)
def test_a_reward_model_that_transformers_wrote_is_written_back_bit_for_bit(tmp_path, name):
    module, params, _ = from_pretrained_reward_model(GOLDEN / name)
    save_pretrained(tmp_path / "copy", module, params)
    found, expected = (safetensors.numpy.load_file(f / "model.safetensors") for f in (tmp_path / "copy", GOLDEN / name))
    assert found.keys() == expected.keys()
    for tensor in expected:
        np.testing.assert_array_equal(found[tensor], expected[tensor], strict=True)
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "copy", GOLDEN / name))
    assert ours == {key: theirs[key] for key in ours}
    again, again_params, _ = from_pretrained_reward_model(tmp_path / "copy", dtype="bfloat16")
    assert again.backbone.config.dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, again_params, params)


def test_a_pretrained_decoder_keeps_its_weights_under_a_fresh_head_of_the_right_spread():
    decoder, decoder_params, _ = from_pretrained(GOLDEN / "llama3")
    params = scalar_head_params(jax.random.key(0), decoder_params)
    module = ScalarHead(decoder)
    expected = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(lambda leaf: leaf.shape, expected)
    assert "lm_head" in decoder_params
    assert "lm_head" not in params["backbone"]
    assert params["backbone"]["blocks"] is decoder_params["blocks"]
    wide = scalar_head_params(jax.random.key(0), {"token_embedding": {"embedding": np.zeros((1, 9999))}})
    np.testing.assert_allclose(wide["score"]["kernel"].std(), 0.01, rtol=0.05)


def test_values_come_with_a_cache_as_from_the_decoder():
    module, params, _ = from_pretrained_reward_model(GOLDEN / "gpt2_reward")
    tokens = jnp.asarray(np.load(GOLDEN / "gpt2_reward" / "golden.npz")["tokens"][:1])
    values, nothing = jax.jit(lambda tokens: module.apply({"params": params}, tokens))(tokens)
    assert nothing is None
    assert values.dtype == jnp.float32

    @jax.jit
    def in_two_parts(tokens):
        first, cache = module.apply({"params": params}, tokens[:, :19], cache=20)
        last, _ = module.apply({"params": params}, tokens[:, 19:], cache=cache)
        return jnp.concatenate([first, last], axis=1)

    np.testing.assert_allclose(in_two_parts(tokens), values, atol=1e-5)


@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=4))
def test_the_value_is_taken_at_the_last_real_token(rows):
    mask = np.array(rows)
    values = np.arange(1, mask.size + 1, dtype=np.float32).reshape(mask.shape)
    expected = [row[real][-1] if real.any() else 0 for row, real in zip(values, mask, strict=True)]
    np.testing.assert_array_equal(last_token_values(jnp.asarray(values), jnp.asarray(mask)), expected)


def test_a_reward_model_and_a_language_model_are_not_taken_for_each_other(tmp_path):
    with pytest.raises(ValueError, match="holds a reward model: load it with from_pretrained_reward_model"):
        from_pretrained(GOLDEN / "llama_reward")
    with pytest.raises(ValueError, match=r"no reward model \(architectures=\['LlamaForCausalLM'\]\). Load a language"):
        from_pretrained_reward_model(GOLDEN / "llama2")
    folder = Path(shutil.copytree(GOLDEN / "gpt2_reward", tmp_path / "model"))
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    safetensors.numpy.save_file(tensors | {"score.weight": np.ones((3, 16), np.float32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"score.weight gives an array of shape \(16, 3\), but .* \(16, 1\)"):
        from_pretrained_reward_model(folder)
    del tensors["score.weight"]
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \['score.weight'\]"):
        from_pretrained_reward_model(folder)
