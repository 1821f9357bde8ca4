"""Adapters in the folder format of PEFT: adapter_config.json and adapter_model.safetensors.

    save_adapters(folder, module, params)              # what PEFT's PeftModel.from_pretrained(model, folder) loads
    params = load_adapters(folder, module, base)       # what PEFT's save_pretrained wrote

References:
    https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

import json
import os
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxrl_llm.models.architectures import ARCHITECTURES
from jaxrl_llm.models.checkpoint import Layout
from jaxrl_llm.models.decoder import Decoder
from jaxrl_llm.models.gpt2 import GPT2
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.models.lora import TRAINED_WHOLE, Adapted, LoraConfig, flat_leaves, nested_leaves
from jaxrl_llm.models.pretrained import published
from jaxrl_llm.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SCORE = f"{PREFIX}score.weight"
PAIR = {"a": "lora_A", "b": "lora_B"}
"""PEFT keeps each as torch keeps linear layers, [outputs, inputs]: ours are transposed."""
UNSUPPORTED = {
    "bias": ("none",),
    "use_dora": (False,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "modules_to_save": (None, [], ["score"], ["classifier", "score"]),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
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
    decoder = module.backbone if isinstance(module, ScalarHead) else module
    names, tensors, targets = _names(module), {}, set()
    for leaf_path, leaf in flat_leaves(params.lora).items():
        layer, kind = leaf_path.rsplit("/", 1)
        if kind not in PAIR:
            tensors[SCORE] = np.ascontiguousarray(np.asarray(leaf).T)
            continue
        targets.add(names[layer].split("*.")[-1])
        for index, array in enumerate(np.asarray(leaf)):
            tensors[_tensor(names[layer], index, kind)] = np.ascontiguousarray(array.T)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if isinstance(module, ScalarHead) else "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "inference_mode": True,
        "r": params.config.r,
        "lora_alpha": params.config.lora_alpha,
        "lora_dropout": params.config.lora_dropout,
        "use_rslora": params.config.use_rslora,
        "target_modules": sorted(targets),
        "fan_in_fan_out": isinstance(decoder, GPT2),  # whose Conv1D keeps [inputs, outputs]
        "bias": "none",
        "modules_to_save": ["score"] if SCORE in tensors else None,
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
    kernels, leaves = flat_leaves(params), {}
    for layer, name in _names(module).items():
        if _tensor(name, 0, "a") in tensors:
            layers, inputs, outputs = kernels[f"{layer}/kernel"].shape
            shapes = {"a": (found["r"], inputs), "b": (outputs, found["r"])}
            for kind in PAIR:
                rows = [_take(tensors, _tensor(name, index, kind), shapes[kind]) for index in range(layers)]
                leaves[f"{layer}/{kind}"] = np.stack(rows).swapaxes(1, 2)
    targets = tuple(sorted({leaf.rsplit("/", 1)[0] for leaf in leaves}))
    if SCORE in tensors and "score/kernel" in kernels:
        leaves["score/kernel"] = _take(tensors, SCORE, kernels["score/kernel"].shape[::-1]).T
    if tensors or not targets:
        raise ValueError(f"{folder / WEIGHTS} does not fit the model: unexpected {sorted(tensors)[:5]}.")
    config = LoraConfig(
        r=found["r"],
        lora_alpha=found["lora_alpha"],
        lora_dropout=found.get("lora_dropout", 0.0),
        target_modules=tuple(map(re.escape, targets)),
        use_rslora=found.get("use_rslora", False),
    )
    whole = {name: params[name] for name in TRAINED_WHOLE if name in params}
    return Adapted(params, whole | nested_leaves({name: jnp.asarray(leaf) for name, leaf in leaves.items()}), config)


def _layout(module: Decoder | ScalarHead) -> Layout:
    if isinstance(module, ScalarHead):
        return ARCHITECTURES[module.backbone.config.model_type].layout.of_scalar_head()
    return ARCHITECTURES[module.config.model_type].layout


def _names(module: Decoder | ScalarHead) -> dict[str, str]:
    """Path of each of our linear layers -> PEFT's name, with `*` for the number of the layer."""
    layout = _layout(module)
    rows = layout.names.items()
    return {
        leaf.removesuffix("/kernel"): PREFIX + layout.prefix + name.removesuffix(".weight")
        for name, leaf in rows
        if "*" in name and leaf.endswith("/kernel")
    }


def _tensor(name: str, layer: int, kind: str) -> str:
    return f"{name.replace('*', str(layer))}.{PAIR[kind]}.weight"


def _take(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Takes a tensor out, in float32.

    Raises:
        ValueError: If it is missing, of another shape or not finite.
    """
    if name not in tensors:
        raise ValueError(f"The adapters lack {name}: ours adapt a kind of layer throughout the model.")
    tensor = tensors.pop(name).astype(np.float32)
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tensor.shape}, but the model and r ask for {shape}.")
    if not np.isfinite(tensor).all():
        raise ValueError(f"{name} has NaN or infinite values: the run that saved it diverged, or the file is damaged.")
    return tensor
