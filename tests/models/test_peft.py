"""Adapters in PEFT's folders: names and shapes, a round trip to the bit, and what does not fit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxrl_llm.models import (
    GPT2,
    GPT2Config,
    Llama,
    LlamaConfig,
    LoraConfig,
    ScalarHead,
    adapt,
    load_adapters,
    save_adapters,
    scalar_head_params,
    split_trainable,
)
from tests.models.test_lora import LLAMA_SIZES, make, trained

TOKENS = jnp.array([[3, 1, 4, 1]])
GPT2_NAMES = [f"base_model.model.transformer.h.{i}.attn.c_attn.lora_{x}.weight" for i in range(3) for x in "AB"]
LLAMA_LAYERS = ("mlp.down_proj", "self_attn.q_proj")


@pytest.fixture
def saved(tmp_path):
    module, params = make("gpt2")
    adapted = trained(adapt(jax.random.key(1), params, LoraConfig(r=2, lora_alpha=6, lora_dropout=0.1)))
    save_adapters(tmp_path / "adapter", module, adapted, base_model="some/base")
    return tmp_path / "adapter", module, adapted


def test_the_files_are_those_of_peft(saved):
    folder, _, adapted = saved
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((folder / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6, "lora_dropout": 0.1}
    expected |= {"target_modules": ["attn.c_attn"], "fan_in_fan_out": True, "base_model_name_or_path": "some/base"}
    assert config.items() >= expected.items()
    tensors = load_file(folder / "adapter_model.safetensors")
    assert sorted(tensors) == GPT2_NAMES
    np.testing.assert_array_equal(tensors[GPT2_NAMES[2]], adapted.lora["blocks"]["qkv"]["a"][1].T)
    assert (folder / "adapter_model.safetensors").stat().st_mode == (folder / "adapter_config.json").stat().st_mode


def test_what_was_saved_is_loaded_to_the_bit(saved):
    folder, module, adapted = saved
    again = load_adapters(folder, module, adapted.base)
    assert again.base is adapted.base
    assert again.config.scale == adapted.config.scale == 3
    assert again.config.lora_dropout == 0.1
    jax.tree.map(np.testing.assert_array_equal, again.lora, adapted.lora)
    fresh = adapt(jax.random.key(0), adapted.base, again.config)
    assert jax.tree.structure(fresh) == jax.tree.structure(again)


def test_llama_and_a_scalar_head_are_saved_under_their_names(tmp_path):
    decoder, decoder_params = make("llama")
    module, params = ScalarHead(decoder), scalar_head_params(jax.random.key(1), decoder_params)
    config = LoraConfig(r=3, target_modules=("query", "mlp_out"), use_rslora=True, use_dora=True)
    adapted = trained(adapt(jax.random.key(2), params, config))
    save_adapters(tmp_path / "adapter", module, adapted)
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    layers = [f"base_model.model.model.layers.{i}.{layer}" for i in range(3) for layer in LLAMA_LAYERS]
    names = [f"{layer}.lora_{x}" for layer in layers for x in ("A.weight", "B.weight", "magnitude_vector")]
    assert sorted(tensors) == sorted([*names, "base_model.model.score.weight"])
    assert tensors["base_model.model.score.weight"].shape == (1, 8)
    written = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (written["task_type"], written["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert (written["fan_in_fan_out"], written["use_rslora"]) == (False, True)
    again = load_adapters(tmp_path / "adapter", module, params)
    jax.tree.map(np.testing.assert_array_equal, again.lora, adapted.lora)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "holds peft_type='IA3'; only LORA"),
        ({"use_dora": True}, "lack .*h.0.attn.c_attn.lora_magnitude_vector"),
        ({"bias": "all"}, "lack .*bias"),
        ({"lora_bias": True}, "sets lora_bias=True; only False is implemented"),
        ({"rank_pattern": {"c_attn": 4}}, "sets rank_pattern="),
        ({"init_lora_weights": "pissa"}, "sets init_lora_weights='pissa'"),
        ({"r": 4}, r"lora_A.weight gives an array of shape \(3, 8, 2\), but the model asks for \(3, 8, 4\)"),
    ],
)
def test_other_adapters_are_refused_by_what_they_say(saved, changes, message):
    folder, module, adapted = saved
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        load_adapters(folder, module, adapted.base)


def test_tensors_that_do_not_fit_are_refused_by_name(saved):
    folder, module, adapted = saved
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    wrong = {
        "lack .*h.2.attn.c_attn.lora_B": {k: v for k, v in tensors.items() if k != GPT2_NAMES[-1]},
        "NaN or infinite": tensors | {GPT2_NAMES[1]: np.full_like(tensors[GPT2_NAMES[1]], np.nan)},
        r"unexpected \['base_model.model.other'\]": tensors | {"base_model.model.other": tensors[GPT2_NAMES[0]]},
        r"does not fit the model: unexpected \[\]": {},
    }
    for message, contents in wrong.items():
        save_file(contents, file)
        with pytest.raises(ValueError, match=message):
            load_adapters(folder, module, adapted.base)


def test_missing_files_and_adapters_that_are_off_are_refused(saved, tmp_path):
    folder, module, adapted = saved
    with pytest.raises(ValueError, match="adapters off"):
        save_adapters(tmp_path / "other", module, split_trainable(adapted)[1])
    assert not (tmp_path / "other").exists()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors is missing: is .* a folder of adapters"):
        load_adapters(folder, module, adapted.base)


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "kind"),
    [("gpt2", {}), ("llama", {"use_rslora": True}), ("llama", {"use_dora": True})]
    + [("gpt2", {"bias": bias, "use_dora": True}) for bias in ("lora_only", "all")],
)
@pytest.mark.filterwarnings("ignore")
def test_adapters_of_peft_give_its_logits_here_and_ours_there(name, kind, tmp_path):
    torch, peft, transformers = (pytest.importorskip(library) for library in ("torch", "peft", "transformers"))
    from jaxrl_llm.models import from_pretrained, save_pretrained

    if name == "gpt2":
        module = GPT2(GPT2Config(vocab_size=13, n_positions=16, n_embd=8, n_layer=3, n_head=2, initializer_range=0.3))
        targets = ["c_attn", "c_fc"]
    else:
        module, targets = Llama(LlamaConfig(**LLAMA_SIZES)), ["q_proj", "down_proj"]
    params = module.init(jax.random.key(0), TOKENS)["params"]
    save_pretrained(tmp_path / "base", module, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    options = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **kind)
    theirs = peft.get_peft_model(theirs, options).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_("magnitude" in parameter_name, 0.3, generator=generator)
    theirs.save_pretrained(tmp_path / "theirs")
    tokens = torch.tensor(np.asarray(TOKENS))

    def logits_of(model):
        with torch.no_grad():
            return model(input_ids=tokens).logits.numpy()

    module, params, _ = from_pretrained(tmp_path / "base")
    adapted = load_adapters(tmp_path / "theirs", module, params)
    found = module.apply({"params": adapted}, TOKENS)[0]
    assert abs(found - module.apply({"params": params}, TOKENS)[0]).max() > 0.1
    np.testing.assert_allclose(found, logits_of(theirs), atol=1e-5, rtol=1e-5)
    save_adapters(tmp_path / "ours", module, adapted)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    back = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    np.testing.assert_array_equal(logits_of(back), logits_of(theirs))
