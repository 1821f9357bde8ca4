"""Imports models of the Llama architecture from GGUF, the format of llama.cpp: weights, config and tokenizer in one file.

Quantised weights are expanded to float32. (To run a model in 4 or 8 bits, quantise it after loading.)
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.models.checkpoint import params_from_tensors
from jaxrl_llm.models.llama import Llama
from jaxrl_llm.models.llama_checkpoint import LAYOUT
from jaxrl_llm.models.llama_config import LlamaConfig
from jaxrl_llm.types import Params

NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""llama.cpp's name of a tensor -> Hugging Face's, without `blk.*` / `layers.*` before and `.weight` after."""

CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type: special tokens, and added ones that are text


def from_gguf(path: str | os.PathLike[str], **settings: Any) -> tuple[Llama, Params, Any]:
    """Loads a Llama from a GGUF file.

    Args:
        path: The file. Its architecture must be "llama" (which SmolLM2 and Mistral are too), and its tokenizer a
            byte-level BPE split as GPT-2's or SmolLM's.
        settings: Fields of `LlamaConfig` to set or replace.

    Returns:
        The module, its parameters in float32, and a fast tokenizer of transformers with the file's chat template.

    Raises:
        ModuleNotFoundError: If the package `gguf` is not installed.
        FileNotFoundError: If there is no such file.
        ValueError: If it is no GGUF file, or holds another architecture or tokenizer; if a tensor is missing,
            unexpected, of another shape or not finite.
    """
    reader = _open(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    module = _module(reader, fields, **settings)
    params = params_from_tensors(_tensors(reader, module.config), module, LAYOUT)
    return module, params, _tokenizer(fields)


def gguf_module(path: str | os.PathLike[str], **settings: Any) -> Llama:
    """Makes the module of a GGUF file from its header; the weights are not read.

    Args:
        path: The file.
        settings: Fields of `LlamaConfig` to set or replace.

    Raises:
        ModuleNotFoundError: If the package `gguf` is not installed.
        FileNotFoundError: If there is no such file.
        ValueError: If it is no GGUF file, or holds another architecture.
    """
    reader = _open(path)
    return _module(reader, {name: field.contents() for name, field in reader.fields.items()}, **settings)


def _module(reader: Any, fields: Mapping[str, Any], **settings: Any) -> Llama:
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    return Llama(dataclasses.replace(_config(fields, tied), **settings))


def _open(path: str | os.PathLike[str]) -> Any:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Loading {os.fspath(path)!r} needs the package gguf: pip install 'jaxrl-llm[gguf]'."
        ) from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"{os.fspath(path)!r} is no file on this machine.")
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{os.fspath(path)!r} is no readable GGUF file ({error}): download it again.") from error


def _config(fields: Mapping[str, Any], tied: bool) -> LlamaConfig:
    """Reads the config from the header."""
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"general.architecture is {architecture!r} in this GGUF file; only 'llama' is implemented.")
    scaling = fields.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"llama.rope.scaling.type is {scaling!r} in this GGUF file; only 'none' is implemented.")
    heads = fields["llama.attention.head_count"]
    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=fields.get("llama.attention.key_length"),
        max_position_embeddings=fields["llama.context_length"],
        # the header has it in float32, which would turn 1e-05 into 9.99999974e-06
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_theta=fields.get("llama.rope.freq_base", 10000.0),
        tie_word_embeddings=tied,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
    )


def _tensors(reader: Any, config: LlamaConfig) -> dict[str, np.ndarray]:
    """Expands the weights, under Hugging Face's names and in Hugging Face's order of rows."""
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.kv_heads}
    tensors = {}
    for tensor in reader.tensors:
        *block, name, kind = tensor.name.split(".")
        if name not in NAMES:
            raise ValueError(f"The GGUF file has a tensor {tensor.name!r}, which is not implemented.")
        prefix = f"layers.{block[1]}." if block else ""
        array = dequantize(tensor.data, tensor.tensor_type)
        tensors[f"{prefix}{NAMES[name]}.{kind}"] = _unpermute(array, heads[name]) if name in heads else array
    return tensors


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Restores the order of query or key rows: llama.cpp rotates neighbours, Hugging Face one half with the other."""
    pairs = weight.shape[0] // heads // 2
    return weight.reshape(heads, pairs, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _tokenizer(fields: Mapping[str, Any]) -> Any:
    """Rebuilds the tokenizer from the header."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend: Any = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    )
    backend.pre_tokenizer = _pre_tokenizer(fields)
    backend.decoder = tokenizers.decoders.ByteLevel()
    added = [
        tokenizers.AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    backend.add_tokens(added)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: fields.get(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=fields.get("tokenizer.chat_template"),
        **{f"{name}_token": tokens[index] for name, index in ids.items() if index is not None},
    )


def _pre_tokenizer(fields: Mapping[str, Any]) -> Any:
    """Says how text is split before the merges; the header has only a name for it."""
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    kinds = {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
    }
    model, kind = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if model != "gpt2" or kind not in kinds:
        raise ValueError(
            f"The GGUF file has a tokenizer of the kind {model!r} / {kind!r}; only 'gpt2' with {', '.join(kinds)} is "
            "implemented. Convert the model to a Hugging Face folder."
        )
    return kinds[kind]
