"""Reads and writes Hugging Face GPT-2 folders (config.json, model.safetensors, tokenizer files), without torch."""

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.models import gpt2_checkpoint
from jaxrl_llm.models.gpt2 import GPT2
from jaxrl_llm.models.gpt2_config import GPT2Config
from jaxrl_llm.types import Params

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")


def from_pretrained(
    path_or_id: str | os.PathLike[str], *, revision: str | None = None, **settings: Any
) -> tuple[GPT2, Params, Any]:
    """Loads a GPT-2 from a Hugging Face folder, or from the hub.

    Args:
        path_or_id: Folder with config.json and model.safetensors (or its shards and their index), or a hub id such as
            "openai-community/gpt2", which is downloaded once into Hugging Face's cache.
        revision: Branch, tag or commit on the hub.
        settings: Fields of `GPT2Config` to set or replace, such as `dtype="bfloat16"`, `remat=True`, `resid_pdrop=0.0`.

    Returns:
        The module, its parameters in float32 (whatever the file holds), and the tokenizer of transformers, or None if
        the folder has no tokenizer files.

    Raises:
        FileNotFoundError: If the folder, config.json or the weights are missing.
        ValueError: If the model is no GPT-2 or uses an option that ours does not have; if a tensor is missing,
            unexpected or of another shape; if the tokenizer has more entries than the model.
    """
    folder = _resolve(path_or_id, revision)
    module = GPT2(dataclasses.replace(_read_config(folder), **settings))
    params = gpt2_checkpoint.params_from_tensors(_read_tensors(folder), module)
    tokenizer = _read_tokenizer(folder)
    _check_vocabulary(tokenizer, module.config)
    return module, params, tokenizer


def save_pretrained(path: str | os.PathLike[str], module: GPT2, params: Params, tokenizer: Any = None) -> None:
    """Saves a folder that `from_pretrained`, and transformers, can load.

    Everything is written elsewhere first. A new folder then appears in one rename; in a folder that exists, each file
    is replaced in one rename (the weights last), and all other files stay as they are.

    Args:
        path: Folder to write; parents are made.
        module: The model; its `dtype`, `remat` and `attention` are not saved.
        params: Its parameters; each is saved in the type that it has.
        tokenizer: A tokenizer of transformers; None writes none.

    Raises:
        ValueError: If `params` do not fit `module`, or the tokenizer has more entries than the model.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    _check_vocabulary(tokenizer, module.config)
    tensors = gpt2_checkpoint.tensors_from_params(params, module)
    config = gpt2_checkpoint.config_to_json(module.config) | {"dtype": tensors["transformer.wte.weight"].dtype.name}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path if path.is_dir() else path.parent  # a rename works within one file system only
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=beside) as temporary:
        folder = Path(temporary, "model")
        folder.mkdir()
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors writes files that only their owner can read
        _publish(folder, path)


def _publish(folder: Path, path: Path) -> None:
    """Moves a finished folder to its place or, if there is one already, each of its files."""
    if not path.exists():
        folder.rename(path)
        return
    files = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    for file in sorted(files, key=lambda file: file.name == WEIGHTS):
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).replace(path / file)


def _resolve(path_or_id: str | os.PathLike[str], revision: str | None) -> Path:
    """Returns the folder: the path itself, or a snapshot of that id from the hub."""
    from huggingface_hub import snapshot_download

    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
        return Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"path_or_id={str(path_or_id)!r} is no folder on this machine, and the Hugging Face hub gave nothing under "
            f"that id ({type(error).__name__}: {error}). Check the spelling, the network and HF_HUB_OFFLINE."
        ) from error


def _read_config(folder: Path) -> GPT2Config:
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: is {folder} the folder of a model?")
    return gpt2_checkpoint.config_from_json(json.loads(file.read_text()))


def _weight_files(folder: Path) -> list[Path]:
    """Finds the one file of weights, or the shards that the index names."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / f"{WEIGHTS}.index.json"
    if index.is_file():
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing, though {index.name} names it: download it again.")
        return files
    if any(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} has weights in torch's pickle format only. Convert them where torch is installed: "
            f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})."
        )
    raise FileNotFoundError(f"{folder / WEIGHTS} is missing, and so is {index.name}.")


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Reads all weights, under their names in the files."""
    from safetensors import SafetensorError, safe_open

    tensors = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, "numpy") as file:
                names = file.keys()
                tensors |= {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path} is no readable safetensors file ({error}): download it again.") from error
    return tensors


def _read_tokenizer(folder: Path) -> Any:
    """Loads the folder's tokenizer, if it has one."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _check_vocabulary(tokenizer: Any, config: GPT2Config) -> None:
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries and the model only vocab_size={config.vocab_size}: "
            "some texts would have ids without an embedding. Use the model's own tokenizer, or enlarge the model."
        )
