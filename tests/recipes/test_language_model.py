"""The models that recipes take: of any architecture, from a folder or a GGUF file."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data.tokenizers import character_tokenizer
from jaxrl_llm.recipes.options import ModelOptions
from jaxrl_llm.recipes.text.language_model import complete, load_model

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def folder(tmp_path):
    """A Llama that transformers wrote, with a tokenizer of as many entries."""
    folder = Path(shutil.copytree(GOLDEN / "llama3", tmp_path / "llama"))
    character_tokenizer("".join(chr(ord("0") + index) for index in range(59))).save_pretrained(folder)
    return folder


def test_a_llama_folder_is_taken_with_the_options_of_the_run_and_writes_what_torch_writes(folder):
    options = ModelOptions(model=str(folder), dropout=0.25, dtype="bfloat16", remat=True)
    config = load_model(options, jax.random.key(0)).module.config
    assert (config.model_type, config.attention_dropout) == ("llama", 0.25)
    assert (config.dtype, config.remat) == (jnp.bfloat16, True)

    model = load_model(ModelOptions(model=str(folder)), jax.random.key(0))
    golden = np.load(GOLDEN / "llama3" / "golden.npz")
    prompt = golden["tokens"][0]
    text = complete(model, model.params, [prompt], jax.random.key(0), max_new_tokens=8)[0]
    assert text == model.tokenizer.decode(golden["greedy"][0], skip_special_tokens=True)
    with pytest.raises(ValueError, match="context_length=64 tokens, and 65 are needed"):
        complete(model, model.params, [prompt], jax.random.key(0), max_new_tokens=46)


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="holds no tokenizer files; save them into the same folder"):
        load_model(ModelOptions(model=str(GOLDEN / "llama3")), jax.random.key(0))
