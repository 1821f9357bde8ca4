"""Adapters in the folder format of PEFT: adapter_config.json and adapter_model.safetensors.

    save_adapters(folder, module, params)              # what PEFT's PeftModel.from_pretrained(model, folder) loads
    params = load_adapters(folder, module, base)       # what PEFT's save_pretrained wrote

References:
    https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxrl_llm.models.architectures import ARCHITECTURES
from jaxrl_llm.models.decoder import Decoder
from jaxrl_llm.models.gpt2 import GPT2
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.models.lora import Adapted, LoraConfig, init_lora
from jaxrl_llm.models.pretrained import published
from jaxrl_llm.models.trees import flat_leaves, linear_kernels
from jaxrl_llm.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ADAPTERS = {"a": ".lora_A.weight", "b": ".lora_B.weight", "m": ".lora_magnitude_vector"}
"""PEFT keeps the first two as torch keeps linear layers, [outputs, inputs]: ours are transposed."""
SHARED = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias")
UNSUPPORTED = {
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "modules_to_save": (None, [], ["score"], ["classifier", "score"]),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "lora_bias": (False,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
}
"""What our adapters do not have, with the values that leave it off. Other ways to begin than these change the base too."""


def save_adapters(
    path: str | os.PathLike[str], module: Decoder | ScalarHead, params: Adapted, *, base_model: str = ""
) -> None:
    """Saves adapters as PEFT does. A new folder appears in one rename; of one that exists each file does, weights last.

    Args:
        path: Folder to write; parents are made.
        module: The model that they adapt.
        params: Its parameters; the base is not saved.
        base_model: Name or folder of the base, for those who read the folder.

    Raises:
        ValueError: If the adapters are off.
    """
    from safetensors.numpy import save_file

    if params.lora is None:
        raise ValueError("params have their adapters off: save what is trained, join_trainable(trainable, frozen).")
    tensors, targets = {}, set[str]()
    leaves = flat_leaves(params.lora)
    for row, leaf in zip(_rows(module, leaves), leaves.values(), strict=True):
        array = np.asarray(leaf)
        array = array.swapaxes(-1, -2) if row.transposed else array
        parts = array if row.stacked else [array]
        tensors |= {name: np.ascontiguousarray(part) for name, part in zip(row.tensors, parts, strict=True)}
        targets |= {row.module} if row.module else set()
    decoder = module.backbone if isinstance(module, ScalarHead) else module
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if isinstance(module, ScalarHead) else "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        **{name: getattr(params.config, name) for name in SHARED},
        "target_modules": sorted(targets),
        "fan_in_fan_out": isinstance(decoder, GPT2),  # whose Conv1D keeps [inputs, outputs]
        "modules_to_save": ["score"] if "score" in params.lora else None,
    }
    with published(Path(path), WEIGHTS) as folder:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load_adapters(path: str | os.PathLike[str], module: Decoder | ScalarHead, params: Params) -> Adapted:
    """Puts adapters that PEFT or `save_adapters` saved beside the parameters of their base.

    Args:
        path: Folder with adapter_config.json and adapter_model.safetensors.
        module: The model.
        params: Parameters of the base; they are shared, not copied.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If they are no LoRA adapters, or of a kind that ours are not; if a tensor is missing, unexpected, of
            another shape or not finite.
    """
    from safetensors.numpy import load_file

    folder = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing: is {folder} a folder of adapters?")
    found = json.loads((folder / CONFIG).read_text())
    if found.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG} holds peft_type={found.get('peft_type')!r}; only LORA can be loaded.")
    for name, implemented in UNSUPPORTED.items():
        if found.get(name, implemented[0]) not in implemented:
            raise ValueError(f"{folder / CONFIG} sets {name}={found[name]!r}; only {implemented[0]!r} is implemented.")
    tensors = load_file(folder / WEIGHTS)
    kernels = linear_kernels(params)
    firsts = _rows(module, {f"{layer}/a": kernel for layer, kernel in kernels.items()})
    targets = [re.escape(layer) for layer, row in zip(kernels, firsts, strict=True) if row.tensors[0] in tensors]
    if not targets:
        raise ValueError(f"{folder / WEIGHTS} does not fit the model: unexpected {sorted(tensors)[:5]}.")
    config = LoraConfig(target_modules=targets, **{name: found[name] for name in SHARED if name in found})
    like = flat_leaves(jax.eval_shape(lambda: init_lora(jax.random.key(0), params, config)))
    leaves = {}
    for row, (leaf, shape) in zip(_rows(module, like), like.items(), strict=True):
        parts = [_take(tensors, name) for name in row.tensors]
        array = np.stack(parts) if row.stacked else parts[0]
        array = array.swapaxes(-1, -2) if row.transposed else array
        if array.shape != shape.shape:
            raise ValueError(
                f"{row.tensors[0]} gives an array of shape {array.shape}, but the model asks for {shape.shape}."
            )
        leaves[leaf] = jnp.asarray(array)
    if tensors:
        raise ValueError(f"{folder / WEIGHTS} does not fit the model: unexpected {sorted(tensors)[:5]}.")
    return Adapted(params, traverse_util.unflatten_dict(leaves, sep="/"), config)


class _Row(NamedTuple):
    """Where a leaf of adapters lies in the file.

    Attributes:
        tensors: One, or one for each layer.
        stacked: Whether it is one for each layer.
        transposed: Whether they are kept as [outputs, inputs].
        module: PEFT's name of the adapted module, for the first leaf of each; else empty.
    """

    tensors: list[str]
    stacked: bool
    transposed: bool
    module: str


def _rows(module: Decoder | ScalarHead, leaves: Mapping[str, Any]) -> list[_Row]:
    """Finds the tensors of each of these leaves of adapters."""
    is_scalar = isinstance(module, ScalarHead)
    layout = ARCHITECTURES[(module.backbone if is_scalar else module).config.model_type].layout
    layout = layout.of_scalar_head() if is_scalar else layout
    names = {leaf: name for name, leaf in layout.names.items()}

    def row(path: str, leaf: Any) -> _Row:
        layer, kind = path.rsplit("/", 1)
        if kind in ADAPTERS:
            adapted = names[f"{layer}/kernel"].removesuffix(".weight")
            name, transposed = adapted + ADAPTERS[kind], kind in "ab"
        else:
            adapted, name, transposed = "", names[path], names[path] in layout.transposed
            if f"{layer}/a" in leaves:
                name = name.removesuffix("bias") + "base_layer.bias"
        full = PREFIX + ("" if name in layout.heads else layout.prefix) + name
        stacked = "*" in name
        tensors = [full.replace("*", str(index)) for index in range(leaf.shape[0])] if stacked else [full]
        return _Row(tensors, stacked, transposed, adapted.split("*.")[-1] if kind == "a" else "")

    return [row(path, leaf) for path, leaf in leaves.items()]


def _take(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Takes a tensor out, in float32.

    Raises:
        ValueError: If it is missing or not finite.
    """
    if name not in tensors:
        raise ValueError(f"The adapters lack {name}: ours adapt a kind of layer throughout the model.")
    tensor = tensors.pop(name).astype(np.float32)
    if not np.isfinite(tensor).all():
        raise ValueError(f"{name} has NaN or infinite values: the run that saved it diverged, or the file is damaged.")
    return tensor
