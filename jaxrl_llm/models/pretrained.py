"""Reads and writes Hugging Face folders (config.json, model.safetensors, tokenizer files), without torch."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.models.architectures import ARCHITECTURES, SCALAR_HEAD, Architecture
from jaxrl_llm.models.checkpoint import EMBEDDING, params_from_tensors, tensors_from_params
from jaxrl_llm.models.decoder import Decoder
from jaxrl_llm.models.gguf import from_gguf, gguf_module
from jaxrl_llm.models.heads import ScalarHead
from jaxrl_llm.types import Params

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")


def from_pretrained(
    path_or_id: str | os.PathLike[str], *, revision: str | None = None, **settings: Any
) -> tuple[Decoder, Params, Any]:
    """Loads a language model from a Hugging Face folder, a GGUF file, or the hub.

    Args:
        path_or_id: Folder with config.json and model.safetensors (or its shards and their index); a file that ends in
            ".gguf" (see `from_gguf`); or a hub id such as "openai-community/gpt2", which is downloaded once into
            Hugging Face's cache. GPT-2, Llama, Mistral without a sliding window, Qwen2 and Qwen3 can be loaded.
        revision: Branch, tag or commit on the hub.
        settings: Fields of the config to set or replace, such as `dtype="bfloat16"`, `remat=True`.

    Returns:
        The module, its parameters in float32 (whatever the file holds), and the tokenizer of transformers, or None if
        the folder has no tokenizer files.

    Raises:
        FileNotFoundError: If the folder, config.json or the weights are missing.
        ValueError: If the model is of another type, uses an option that ours does not have, or is a reward model; if a
            tensor is missing, unexpected, of another shape or not finite; if the tokenizer has more entries than the
            model.
    """
    if str(path_or_id).endswith(".gguf"):
        module, params, tokenizer = from_gguf(path_or_id, **settings)
        _check_vocabulary(tokenizer, module.config)
        return module, params, tokenizer
    folder = _resolve(path_or_id, revision)
    module = pretrained_module(folder, **settings)
    layout = ARCHITECTURES[module.config.model_type].layout
    params = params_from_tensors(_read_tensors(folder), module, layout)
    tokenizer = _read_tokenizer(folder)
    _check_vocabulary(tokenizer, module.config)
    return module, params, tokenizer


def pretrained_module(path_or_id: str | os.PathLike[str], *, revision: str | None = None, **settings: Any) -> Decoder:
    """Makes the module of a saved language model from its config alone; the weights are neither needed nor read.

    Args:
        path_or_id: As in `from_pretrained`; of the hub, config.json alone is downloaded.
        revision: As in `from_pretrained`.
        settings: As in `from_pretrained`.

    Raises:
        FileNotFoundError: If there is no such folder, or no config.json in it.
        ValueError: If the model is of another type, uses an option that ours does not have, or is a reward model.
    """
    if str(path_or_id).endswith(".gguf"):
        return gguf_module(path_or_id, **settings)
    folder = _resolve(path_or_id, revision, [CONFIG])
    found, architecture = _read_config(folder)
    if _is_reward_model(found):
        raise ValueError(f"{folder} holds a reward model: load it with from_pretrained_reward_model.")
    return architecture.module(dataclasses.replace(architecture.config_from_json(found), **settings))


def from_pretrained_reward_model(
    path_or_id: str | os.PathLike[str], *, revision: str | None = None, **settings: Any
) -> tuple[ScalarHead, Params, Any]:
    """Loads a model with one score per token: transformers' `…ForSequenceClassification` with `num_labels=1`.

    To start one from a language model instead, see `scalar_head_params`.

    Args:
        path_or_id: As in `from_pretrained`, without GGUF.
        revision: As in `from_pretrained`.
        settings: As in `from_pretrained`.

    Returns:
        The module, its parameters in float32, and the tokenizer or None.

    Raises:
        FileNotFoundError: As `from_pretrained`.
        ValueError: As `from_pretrained`; and if the folder holds a language model, or a classifier of several labels.
    """
    folder = _resolve(path_or_id, revision)
    found, architecture = _read_config(folder)
    if not _is_reward_model(found):
        raise ValueError(
            f"{folder} holds no reward model (architectures={found.get('architectures')}). Load a language model with "
            "from_pretrained, and give it a scalar head with ScalarHead and scalar_head_params."
        )
    config = dataclasses.replace(architecture.config_from_json(found), **settings)
    module = ScalarHead(architecture.module(config))
    params = params_from_tensors(_read_tensors(folder), module, architecture.layout.of_scalar_head())
    tokenizer = _read_tokenizer(folder)
    _check_vocabulary(tokenizer, config)
    return module, params, tokenizer


def is_reward_model(path_or_id: str | os.PathLike[str], *, revision: str | None = None) -> bool:
    """Tells whether a saved model is for `from_pretrained_reward_model` rather than for `from_pretrained`.

    Args:
        path_or_id: As in `from_pretrained`.
        revision: As in `from_pretrained`.

    Raises:
        FileNotFoundError: If there is no such folder or no config.json in it.
        ValueError: If the model is of another type.
    """
    is_gguf = str(path_or_id).endswith(".gguf")
    return not is_gguf and _is_reward_model(_read_config(_resolve(path_or_id, revision))[0])


def save_pretrained(
    path: str | os.PathLike[str], module: Decoder | ScalarHead, params: Params, tokenizer: Any = None
) -> None:
    """Saves a folder that `from_pretrained` (or, of a `ScalarHead`, `from_pretrained_reward_model`) and transformers load.

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
    config, tensors = _to_checkpoint(module, params)
    _check_vocabulary(tokenizer, _decoder(module).config)
    with published(path, WEIGHTS) as folder:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _decoder(module: Decoder | ScalarHead) -> Decoder:
    return module.backbone if isinstance(module, ScalarHead) else module


def _to_checkpoint(module: Decoder | ScalarHead, params: Params) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Makes the contents of config.json and the tensors."""
    decoder, is_scalar = _decoder(module), isinstance(module, ScalarHead)
    architecture = ARCHITECTURES[decoder.config.model_type]
    layout = architecture.layout.of_scalar_head() if is_scalar else architecture.layout
    tensors = tensors_from_params(params, module, layout)
    embedding = next(name for name, leaf in layout.names.items() if leaf.endswith(EMBEDDING))
    config = {
        "architectures": [architecture.name + (SCALAR_HEAD if is_scalar else architecture.language_model)],
        "dtype": tensors[layout.prefix + embedding].dtype.name,
        **architecture.config_to_json(decoder.config),
    }
    if is_scalar:  # so transformers writes num_labels=1
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return config, tensors


@contextlib.contextmanager
def published(path: Path, weights: str) -> Iterator[Path]:
    """Gives a folder to write into. Once all is written it is moved to `path` or, if that is there, each of its files is.

    Args:
        path: Where it goes; parents are made.
        weights: The file that is moved last.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path if path.is_dir() else path.parent  # a rename works within one file system only
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=beside) as temporary:
        folder = Path(temporary, "model")
        folder.mkdir()
        yield folder
        files = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
        readable = next(folder / file for file in files if file.name != weights)
        shutil.copymode(readable, folder / weights)  # safetensors writes files that only their owner can read
        if not path.exists():
            folder.rename(path)
            return
        for file in sorted(files, key=lambda file: file.name == weights):
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).replace(path / file)


def _resolve(path_or_id: str | os.PathLike[str], revision: str | None, patterns: Sequence[str] = FILES) -> Path:
    """Returns the folder: the path itself, or a snapshot of these files of that id from the hub."""
    from huggingface_hub import snapshot_download

    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"path_or_id={str(path_or_id)!r} is no folder on this machine, and the Hugging Face hub gave nothing under "
            f"that id ({type(error).__name__}: {error}). Check the spelling, the network and HF_HUB_OFFLINE."
        ) from error


def _read_config(folder: Path) -> tuple[dict[str, Any], Architecture]:
    """Reads config.json, and finds the architecture that it names."""
    file = folder / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: is {folder} the folder of a model?")
    found = json.loads(file.read_text())
    architecture = ARCHITECTURES.get(found.get("model_type"))
    if architecture is None:
        raise ValueError(
            f"{file} has model_type={found.get('model_type')!r}; only {', '.join(ARCHITECTURES)} can be loaded."
        )
    return found, architecture


def _is_reward_model(found: Mapping[str, Any]) -> bool:
    return any(name.endswith(SCALAR_HEAD) for name in found.get("architectures") or ())


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


def _check_vocabulary(tokenizer: Any, config: Any) -> None:
    if tokenizer is not None and len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries and the model only vocab_size={config.vocab_size}: "
            "some texts would have ids without an embedding. Use the model's own tokenizer, or enlarge the model."
        )
