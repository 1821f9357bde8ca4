"""The two names of everything in a GPT-2: Hugging Face's, in checkpoints, and ours.

`NAMES` is the one place that knows both trees. GPT-2's checkpoints come from TensorFlow: their `Conv1D` weights are
[inputs, outputs], as ours are, so that nothing is transposed but a separate head. No files are touched here.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxrl_llm.models.gpt2 import GPT2
from jaxrl_llm.models.gpt2_config import GPT2Config
from jaxrl_llm.types import Params

NAMES: dict[str, str] = {
    "wte.weight": "token_embedding/embedding",
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
"""Hugging Face tensor -> our leaf. `*` is the layer: ours are stacked along the first axis. `lm_head` is transposed."""

BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
"""Causal masks that old checkpoints store; they are no weights."""

SETTINGS = tuple(
    field.name for field in dataclasses.fields(GPT2Config) if field.name not in ("dtype", "remat", "attention")
)
"""The fields that config.json holds; the others say how to run a model, not what it is."""

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

HEAD, PREFIX = "lm_head.weight", "transformer."


def config_from_json(found: Mapping[str, Any]) -> GPT2Config:
    """Reads the contents of a config.json.

    Raises:
        ValueError: If the model is no GPT-2, or sets an option that ours does not have.
    """
    if found.get("model_type") != "gpt2":
        raise ValueError(f"config.json has model_type={found.get('model_type')!r}; only 'gpt2' can be loaded here.")
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
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"} | settings


def _leaf_shapes(module: GPT2) -> dict[str, tuple[int, ...]]:
    """Shape of each of our leaves, by its path; nothing is computed."""
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    leaves: dict[str, Any] = traverse_util.flatten_dict(variables["params"], sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}


def _file_names(name: str, layers: int) -> list[str]:
    """Lists the tensors behind one row of `NAMES`."""
    return [name.replace("*", str(layer)) for layer in range(layers)] if "*" in name else [name]


def params_from_tensors(tensors: Mapping[str, np.ndarray], module: GPT2) -> Params:
    """Stacks the layers of a checkpoint into our tree, in float32.

    Args:
        tensors: All tensors of the checkpoint, with or without the `transformer.` that some put before their names.
        module: The model to fill.

    Raises:
        ValueError: If a tensor is missing, unexpected or of another shape, or if a tied head is not the embedding.
    """
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not BUFFERS.fullmatch(name)}
    shapes = _leaf_shapes(module)
    rows = {name: leaf for name, leaf in NAMES.items() if leaf in shapes}
    head = None if HEAD in rows else tensors.pop(HEAD, None)
    expected = {file_name for name in rows for file_name in _file_names(name, module.config.n_layer)}
    _check_names("the weights", expected, tensors.keys())
    if head is not None and not np.array_equal(head, tensors["wte.weight"]):
        raise ValueError(
            f"{HEAD} differs from wte.weight, but tie_word_embeddings is true, so that it would be lost. "
            "Pass tie_word_embeddings=False to keep it."
        )

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        tensor = tensors.pop(name)  # frees each layer once it is copied into the stack
        tensor = tensor.T if name == HEAD else tensor
        if tensor.shape != shape:
            raise ValueError(f"{name} gives an array of shape {tensor.shape}, but the config asks for {shape}.")
        return tensor.astype(np.float32)

    leaves = {}
    for name, leaf in rows.items():
        shape = shapes[leaf]
        if "*" in name:
            leaves[leaf] = np.stack([take(layer, shape[1:]) for layer in _file_names(name, shape[0])])
        else:
            leaves[leaf] = take(name, shape)
    return traverse_util.unflatten_dict({path: jnp.asarray(leaf) for path, leaf in leaves.items()}, sep="/")


def tensors_from_params(params: Params, module: GPT2) -> dict[str, np.ndarray]:
    """Takes our tree apart into the tensors of a checkpoint, under the names that `GPT2LMHeadModel` has for them.

    Raises:
        ValueError: If a leaf is missing, unexpected or of another shape than the module's.
    """
    shapes = _leaf_shapes(module)
    leaves = traverse_util.flatten_dict(params, sep="/")
    _check_names("params", shapes.keys(), leaves.keys())
    tensors = {}
    for name, leaf in NAMES.items():
        if leaf not in shapes:
            continue
        array = np.asarray(leaves[leaf])
        if array.shape != shapes[leaf]:
            raise ValueError(f"params at {leaf} have shape {array.shape}, but the module has {shapes[leaf]}.")
        layers = array if "*" in name else [array.T if name == HEAD else array]
        for file_name, tensor in zip(_file_names(name, module.config.n_layer), layers, strict=True):
            tensors[file_name if name == HEAD else PREFIX + file_name] = np.ascontiguousarray(tensor)
    return tensors


def _check_names(what: str, expected: Collection[str], found: Collection[str]) -> None:
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"{what} do not fit the model: {len(missing)} missing {missing[:5]}, "
            f"{len(unexpected)} unexpected {unexpected[:5]}. Check n_layer and tie_word_embeddings."
        )
