"""The two names of everything in a GPT-2: Hugging Face's, in checkpoints, and ours.

GPT-2's checkpoints come from TensorFlow: their `Conv1D` weights are [inputs, outputs], as ours are, so that nothing is
transposed but a separate head. No files are touched here.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.models.checkpoint import EMBEDDING, RUN_SETTINGS, Layout
from jaxrl_llm.models.gpt2_config import GPT2Config

NAMES: dict[str, str] = {
    "wte.weight": EMBEDDING,
    "wpe.weight": "position_embedding/embedding",
    "h.*.ln_1.weight": "blocks/attention_norm/scale",
    "h.*.ln_1.bias": "blocks/attention_norm/bias",
    "h.*.attn.c_attn.weight": "blocks/qkv/kernel",
    "h.*.attn.c_attn.bias": "blocks/qkv/bias",
    "h.*.attn.c_proj.weight": "blocks/attention_out/kernel",
    "h.*.attn.c_proj.bias": "blocks/attention_out/bias",
    "h.*.ln_2.weight": "blocks/mlp_norm/scale",
    "h.*.ln_2.bias": "blocks/mlp_norm/bias",
    "h.*.mlp.c_fc.weight": "blocks/mlp_in/kernel",
    "h.*.mlp.c_fc.bias": "blocks/mlp_in/bias",
    "h.*.mlp.c_proj.weight": "blocks/mlp_out/kernel",
    "h.*.mlp.c_proj.bias": "blocks/mlp_out/bias",
    "ln_f.weight": "final_norm/scale",
    "ln_f.bias": "final_norm/bias",
    "lm_head.weight": "lm_head/kernel",
}
"""Hugging Face tensor -> our leaf. `*` is the layer: ours are stacked along the first axis."""

LAYOUT = Layout(
    names=NAMES,
    transposed=frozenset({"lm_head.weight"}),
    prefix="transformer.",
    buffers=re.compile(r"h\.\d+\.attn\.(masked_)?bias"),  # causal masks
)

SETTINGS = tuple(field.name for field in dataclasses.fields(GPT2Config) if field.name not in RUN_SETTINGS)
"""The fields that config.json holds."""

ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""Other spellings that transformers accepts."""

UNSUPPORTED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
"""Options of transformers that this model does not have, and the value that leaves them off."""

DEFAULTS: dict[str, Any] = {"bos_token_id": 50256, "eos_token_id": 50256}
"""What transformers takes where config.json is silent and our default differs."""


def config_from_json(found: Mapping[str, Any]) -> GPT2Config:
    """Reads the contents of a config.json.

    Raises:
        ValueError: If it sets an option that ours does not have.
    """
    for name, implemented in UNSUPPORTED.items():
        if found.get(name, implemented) != implemented:
            raise ValueError(f"config.json sets {name}={found[name]}; only {name}={implemented} is implemented.")
    found = DEFAULTS | {ALIASES.get(name, name): value for name, value in found.items()}
    settings = {name: found[name] for name in SETTINGS if name in found}
    if isinstance(settings["eos_token_id"], list):
        settings["eos_token_id"] = tuple(settings["eos_token_id"])
    return GPT2Config(**settings)


def config_to_json(config: GPT2Config) -> dict[str, Any]:
    """Returns what config.json says of a model; how to run it (`dtype`, `remat`, `attention`) is not in it."""
    settings = {name: getattr(config, name) for name in SETTINGS}
    return {"model_type": "gpt2"} | settings
