"""The two names of everything in a model of the Llama family: Hugging Face's, in checkpoints, and ours.

torch keeps the weight of a linear layer as [outputs, inputs]: all kernels are transposed. No files are touched here.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.models.checkpoint import EMBEDDING, RUN_SETTINGS, Layout
from jaxrl_llm.models.llama_config import LlamaConfig, RopeScaling

LINEAR: dict[str, str] = {
    "layers.*.self_attn.q_proj": "blocks/query",
    "layers.*.self_attn.k_proj": "blocks/key",
    "layers.*.self_attn.v_proj": "blocks/value",
    "layers.*.self_attn.o_proj": "blocks/attention_out",
    "layers.*.mlp.gate_proj": "blocks/mlp_gate",
    "layers.*.mlp.up_proj": "blocks/mlp_in",
    "layers.*.mlp.down_proj": "blocks/mlp_out",
}
"""Linear layers; those of Qwen2, and of configs that ask for it, have biases."""

KERNELS = {f"{name}.weight": f"{leaf}/kernel" for name, leaf in LINEAR.items()} | {"lm_head.weight": "lm_head/kernel"}

NAMES: dict[str, str] = {
    "embed_tokens.weight": EMBEDDING,
    "layers.*.input_layernorm.weight": "blocks/attention_norm/scale",
    "layers.*.self_attn.q_norm.weight": "blocks/query_norm/scale",
    "layers.*.self_attn.k_norm.weight": "blocks/key_norm/scale",
    "layers.*.post_attention_layernorm.weight": "blocks/mlp_norm/scale",
    "norm.weight": "final_norm/scale",
    **{f"{name}.bias": f"{leaf}/bias" for name, leaf in LINEAR.items()},
    **KERNELS,
}
"""Hugging Face tensor -> our leaf. `*` is the layer: ours are stacked along the first axis."""

LAYOUT = Layout(
    names=NAMES,
    transposed=frozenset(KERNELS),
    prefix="model.",
    buffers=re.compile(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
)

SETTINGS = tuple(
    field.name
    for field in dataclasses.fields(LlamaConfig)
    if field.name not in (*RUN_SETTINGS, "rope_theta", "rope_scaling")
)
"""The fields that config.json holds under the same names; the rotary ones stand in `rope_parameters`."""

LLAMA_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": LLAMA_TOKENS,
    "mistral": LLAMA_TOKENS
    | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096, "intermediate_size": 14336},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768},
    "qwen3": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "head_dim": 128,
    },
}
"""What transformers takes where config.json is silent and our default differs."""


def config_from_json(found: Mapping[str, Any]) -> LlamaConfig:
    """Reads the contents of a config.json, of transformers 5 (`rope_parameters`) or older (`rope_theta`).

    Raises:
        ValueError: If it sets an option that ours does not have.
    """
    found = DEFAULTS[found["model_type"]] | dict(found)
    _check_window(found)
    settings = {name: found[name] for name in SETTINGS if name in found}
    if isinstance(settings.get("eos_token_id"), list):
        settings["eos_token_id"] = tuple(settings["eos_token_id"])
    return LlamaConfig(**settings, **_rotary_settings(found))


def config_to_json(config: LlamaConfig) -> dict[str, Any]:
    """Returns what config.json says of a model; how to run it (`dtype`, `remat`, `attention`) is not in it."""
    settings = {name: getattr(config, name) for name in SETTINGS}
    settings |= {"num_key_value_heads": config.kv_heads, "head_dim": config.head_size}
    if config.model_type == "qwen2" and config.head_dim is None:
        del settings["head_dim"]  # no field of its config, though it is obeyed
    # transformers has these for some of the family only, and its default for the others
    for name, types in {"attention_bias": ("llama", "qwen3"), "mlp_bias": ("llama",)}.items():
        if config.model_type not in types and settings.pop(name):
            raise ValueError(f"{name}=True cannot be saved with model_type={config.model_type!r}, which has none.")
    if config.model_type == "mistral":
        settings["sliding_window"] = None
    scaling = {"rope_type": "default"}
    if config.rope_scaling is not None:
        scaling = {"rope_type": "llama3"} | config.rope_scaling._asdict()
    return settings | {"rope_parameters": {"rope_theta": config.rope_theta} | scaling}


def _rotary_settings(found: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the base and the scaling of rotary positions from the new field or from the two old ones."""
    rope = dict(found.get("rope_parameters") or found.get("rope_scaling") or {})
    rope_theta = rope.get("rope_theta", found.get("rope_theta", 10000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(f"config.json sets rope_type={rope_type!r}; only 'default' and 'llama3' are implemented.")
    partial = rope.get("partial_rotary_factor", found.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(f"config.json sets partial_rotary_factor={partial}; only 1.0 is implemented.")
    scaling = None
    if rope_type == "llama3":
        missing = sorted(set(RopeScaling._fields) - set(rope))
        if missing:
            raise ValueError(f"config.json sets rope_type='llama3' and lacks {', '.join(missing)} beside it.")
        scaling = RopeScaling(**{name: rope[name] for name in RopeScaling._fields})
    return {"rope_theta": float(rope_theta), "rope_scaling": scaling}


def _check_window(found: Mapping[str, Any]) -> None:
    """Refuses sliding windows, save one that the longest sequence fits into."""
    if found["model_type"] == "mistral":
        window = found["sliding_window"]
    else:
        window = found.get("sliding_window") if found.get("use_sliding_window") else None
    longest = found.get("max_position_embeddings", LlamaConfig.max_position_embeddings)
    if window is not None and window < longest:
        raise ValueError(
            f"config.json sets sliding_window={window}, and sliding windows are not implemented. Up to {window} tokens "
            f"it changes nothing: set sliding_window to null and max_position_embeddings to {window} in config.json."
        )
