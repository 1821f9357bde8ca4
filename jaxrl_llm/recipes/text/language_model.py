"""The model that a language recipe trains, and the questions that every recipe asks it."""

import contextlib
import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_llm.data import (
    Row,
    as_rows,
    character_tokenizer,
    collate_prompts,
    load_tokenizer,
    one_digit_sums,
    padding_id,
    read_rows,
    wordnet_definitions,
)
from jaxrl_llm.data.sums import ALPHABET
from jaxrl_llm.data.tokenizers import Tokenizer
from jaxrl_llm.models import (
    GPT2,
    Adapted,
    Decoder,
    GPT2Config,
    Llama,
    LlamaConfig,
    Quantized,
    ScalarHead,
    adapt,
    from_pretrained,
    head_kernel,
    load_adapters,
    merge_lora,
    pretrained_module,
    quantize_params,
    save_adapters,
    save_pretrained,
    split_trainable,
)
from jaxrl_llm.optimizers.first_order import path_name
from jaxrl_llm.recipes.options import ModelOptions, OptimizerOptions
from jaxrl_llm.rewards import named_task_rows
from jaxrl_llm.rollouts import generate
from jaxrl_llm.rollouts.scoring import Apply, HeadKernel
from jaxrl_llm.training.parallel import parse_mesh, shard, whole
from jaxrl_llm.types import Key, Params

CHARACTERS = "characters:"
TASK = "task:"
ADAPTER = "adapter"
"""Folder of the trained adapters of a run, beside that of its model, in which they are merged."""


class LanguageModel(NamedTuple):
    """A model with its parameters, plain or with adapters, and its tokenizer."""

    module: Decoder | ScalarHead
    params: Params
    tokenizer: Tokenizer

    @property
    def apply(self) -> Apply:
        """The model as a function."""
        return self.module.apply

    @property
    def head_kernel(self) -> HeadKernel:
        """The kernel of the head, from parameters."""
        return head_kernel

    @property
    def pad_id(self) -> int:
        """The id that fills batches; masks say what is real."""
        return padding_id(self.tokenizer)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text: that of the tokenizer, and those of the model's config, which may have several."""
        decoder = self.module.backbone if isinstance(self.module, ScalarHead) else self.module
        of_config = decoder.config.eos_token_id
        several = of_config if isinstance(of_config, tuple) else () if of_config is None else (of_config,)
        return tuple(dict.fromkeys([self.tokenizer.eos_token_id, *several]))

    @property
    def context_length(self) -> int:
        """Tokens that the model reads at most."""
        decoder = self.module.backbone if isinstance(self.module, ScalarHead) else self.module
        return decoder.config.context_length

    @property
    def num_params(self) -> int:
        """Number of parameters, adapters included."""
        return _count(self.params)

    @property
    def trainable_share(self) -> str:
        """How many parameters are trained, such as `294,912 of 124,734,720, 0.24 %`."""
        count, total = _count(split_trainable(self.params)[0]), self.num_params
        return f"{count:,} of {total:,}, {100 * count / total:.2f} %"


def in_host_memory() -> contextlib.AbstractContextManager:
    """Makes arrays in the memory of the host: one device may have no room for what is quantised or divided afterwards."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def place(params: Params, options: ModelOptions) -> Params:
    """Brings parameters from the memory of the host to the devices of the mesh, or to the one that there is."""
    if options.mesh:
        return shard(params, parse_mesh(options.mesh))
    if jax.default_backend() == "cpu":
        return params
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params)


def load_model(options: ModelOptions, key: Key, *, tokenizer: Tokenizer | None = None) -> LanguageModel:
    """Loads the model that the options name (a folder, a GGUF file, a hub id), or makes a new one.

    Args:
        options: Which model.
        key: Key of new parameters, and of adapters.
        tokenizer: Of a new model, instead of the one that the options name.

    Raises:
        ValueError: If a saved model comes without a tokenizer, or the mesh is wrong.
    """
    parse_mesh(options.mesh)
    with in_host_memory():
        model = _load_model(options, key, tokenizer)
    return model._replace(params=place(model.params, options))


def _load_model(options: ModelOptions, key: Key, tokenizer: Tokenizer | None) -> LanguageModel:
    key, lora_key = jax.random.split(key) if options.adapts else (key, key)
    if options.model:
        module, params, tokenizer = from_pretrained(options.model)
        if tokenizer is None:
            raise ValueError(f"model={options.model!r} holds no tokenizer files; save them into the same folder.")
    else:
        tokenizer = _tokenizer(options.tokenizer) if tokenizer is None else tokenizer
        params = None
        module = _new_module(options, tokenizer)
    module = _configured(module, options)
    if params is None:
        params = jax.jit(module.init)(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return with_adapters(LanguageModel(module, params, tokenizer), options, lora_key)


def outline_model(options: ModelOptions) -> LanguageModel:
    """Makes what `load_model` does with shapes in the place of all parameters: of a saved model only its config is read.

    A saved model gets a tokenizer that is not its own, for what a program holds does not depend on which ids end a text.

    Args:
        options: Which model; adapters are fresh ones.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If the model is of another type, or `target_modules` names no layer.
    """
    tokenizer = character_tokenizer(ALPHABET) if options.model else _tokenizer(options.tokenizer)
    module = pretrained_module(options.model) if options.model else _new_module(options, tokenizer)
    return outline_of_module(_configured(module, options), tokenizer, options)


def outline_of_module(module: Decoder, tokenizer: Tokenizer, options: ModelOptions) -> LanguageModel:
    """Makes a language model of a module with the shapes of its parameters, with adapters if the options say so.

    Args:
        module: The model.
        tokenizer: Its tokenizer.
        options: What is trained.

    Raises:
        ValueError: If `target_modules` names no layer.
    """

    def params(key: Key) -> Params:
        init_key, lora_key = jax.random.split(key)
        plain = module.init(init_key, jnp.zeros((1, 1), jnp.int32))["params"]
        return with_adapters(LanguageModel(module, plain, tokenizer), options, lora_key).params

    return LanguageModel(module, jax.eval_shape(params, jax.random.key(0)), tokenizer)


def _configured(module: Decoder, options: ModelOptions) -> Decoder:
    """Sets how the options want the model to compute."""
    config = module.config.with_dropout(options.dropout)
    return module.clone(config=dataclasses.replace(config, **run_settings(options)))


def run_settings(options: ModelOptions) -> dict[str, Any]:
    """Lists the fields of a model's config that say how it is run."""
    return {"dtype": jnp.dtype(options.dtype), "remat": options.remat}


def with_adapters(model: LanguageModel, options: ModelOptions, key: Key) -> LanguageModel:
    """Puts adapters beside the parameters if the options say so: saved ones, or fresh ones.

    The base is then quantised if the options say so, and else held in the type that is computed in. Where the options say
    to train all, saved adapters are merged.

    Raises:
        FileNotFoundError: If there are no such saved adapters.
        ValueError: If `target_modules` names no layer, or the saved adapters do not fit.
    """
    if not options.adapts:
        if not options.adapter:
            return model
        return model._replace(params=merge_lora(load_adapters(options.adapter, model.module, model.params)))
    base = jax.tree.map(jnp.asarray, model.params)
    if options.qlora:
        base = quantize_params(base, options.quant_type, use_double_quant=options.use_double_quant)
    base = _cast_matrices(base, jnp.dtype(options.dtype))
    if options.adapter:
        return model._replace(params=load_adapters(options.adapter, model.module, base))
    assert options.lora_config is not None
    return model._replace(params=adapt(key, base, options.lora_config))


def _cast_matrices(params: Params, dtype: jnp.dtype) -> Params:
    """Casts the kernels and embeddings of a decoder to the type that it multiplies in; a scalar head stays in float32."""

    def cast(path: tuple, leaf: Any) -> Any:
        name = path_name(path)
        matrix = name.endswith(("kernel", "embedding")) and not name.startswith("score/")
        return leaf.astype(dtype) if matrix and not isinstance(leaf, Quantized) else leaf

    return jax.tree_util.tree_map_with_path(cast, params, is_leaf=lambda leaf: isinstance(leaf, Quantized))


def save_model(folder: Path, model: LanguageModel, params: Params) -> None:
    """Saves a trained model in float32, and its tokenizer; adapters are merged into it, and saved beside the folder too."""
    params = jax.device_get(whole(params))
    if jax.process_index() > 0:
        return
    with in_host_memory():  # where a quantised model has room to be merged
        params = jax.tree.map(jnp.asarray, params)
        merged = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), merge_lora(params))
    save_pretrained(folder, model.module, merged, model.tokenizer)
    if isinstance(params, Adapted):
        save_adapters(folder.with_name(ADAPTER), model.module, params)


def sizes(config: ModelOptions, model: LanguageModel) -> dict[str, Any]:
    """Counts the parameters, and those that are trained where they are not all; says how fast they learn."""
    known: dict[str, Any] = {"parameters": model.num_params}
    if config.adapts:
        known["trainable"] = model.trainable_share
    if isinstance(config, OptimizerOptions):
        known["learning rate"] = config.peak_learning_rate
    return known


def _count(params: Params) -> int:
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    return sum(leaf.size for leaf in leaves)


def _new_module(options: ModelOptions, tokenizer: Tokenizer) -> Decoder:
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "initializer_range": options.initializer_range,
        "tie_word_embeddings": options.tie_word_embeddings,
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if options.model_type == "gpt2":
        sizes = {name: getattr(options, name) for name in ("n_layer", "n_head", "n_embd", "n_positions")}
        return GPT2(GPT2Config(**shared, **sizes))
    return Llama(
        LlamaConfig(
            **shared,
            hidden_size=options.n_embd,
            # Three matrices of 8/3 the width have the parameters of GPT-2's two of 4 times the width.
            intermediate_size=-(-options.n_embd // 3) * 8,
            num_hidden_layers=options.n_layer,
            num_attention_heads=options.n_head,
            max_position_embeddings=options.n_positions,
        )
    )


def _tokenizer(name: str) -> Tokenizer:
    return character_tokenizer(name.removeprefix(CHARACTERS)) if name.startswith(CHARACTERS) else load_tokenizer(name)


def read_dataset(dataset: str, split: str = "train") -> list[Row]:
    """Reads a dataset: `wordnet` and `sums` come with the library, all else is a file or a name of `datasets`.

    "task:chain_sum(min_terms=2, max_terms=2)" is a task of reasoning-gym, with arguments of `task_rows` (`size`, `seed`,
    `template`, `chat`) and options of its own; the split is "train", "held_out" or "all".
    """
    if dataset.startswith(TASK):
        return as_rows(named_task_rows(dataset.removeprefix(TASK), split=split), dataset)
    if dataset == "wordnet":
        return as_rows(wordnet_definitions(), dataset)
    if dataset == "sums":
        return as_rows(one_digit_sums(operators="+-"), dataset)
    return read_rows(dataset, split=split)


def load_rows(dataset: str, split: str = "train") -> list[Row]:
    """Reads a dataset of which a part is held out.

    Raises:
        ValueError: If there is one row alone, so that none could be held out.
    """
    rows = read_dataset(dataset, split)
    if len(rows) < 2:
        raise ValueError(f"{dataset} has one row; at least 2 are needed, for one is held out for evaluation.")
    return rows


def require_room(model: LanguageModel, tokens: int, cure: str) -> None:
    """Raises a `ValueError` with the cure if the model reads fewer than `tokens` tokens."""
    positions = model.context_length
    if tokens > positions:
        raise ValueError(f"The model reads context_length={positions} tokens, and {tokens} are needed: {cure}.")


SUMS_TOKENIZER = CHARACTERS + ALPHABET
"""The tokenizer that fits the dataset `sums`."""


def complete(
    model: LanguageModel,
    params: Params,
    prompts: Sequence[np.ndarray],
    key: Key,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    batch_size: int = 256,
) -> list[str]:
    """Completes prompts, a batch at a time, and decodes the completions without special tokens.

    Args:
        model: The model; its own parameters are not used.
        params: Parameters to sample with.
        prompts: Token ids of each prompt.
        key: Key of the sampling.
        max_new_tokens: Length of a completion at most.
        temperature: 0 is greedy.
        top_p: Nucleus.
        batch_size: Rows that are completed together.

    Raises:
        ValueError: If the longest prompt and its completion do not fit into the model.
    """
    longest = max(map(len, prompts))
    # The model reads all but the last token that it writes. Lengths are rounded up where there is room.
    room = model.context_length - (max_new_tokens - 1)
    cure = "shorten the prompts, ask for fewer tokens, or give a new model more n_positions"
    require_room(model, longest + max_new_tokens - 1, cure)
    length = max(longest, min(-(-longest // 8) * 8, room))
    batch_size = min(batch_size, len(prompts))
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        rows = list(prompts[start : start + batch_size])
        rows += [rows[0]] * (batch_size - len(rows))  # one shape for all batches; the extra answers are cut off below
        batch = collate_prompts(rows, pad_id=model.pad_id, length=length)
        completions = _generate(
            model.apply,
            params,
            jax.random.fold_in(key, start),
            batch.prompt_ids,
            batch.prompt_mask,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            eos_id=model.eos_ids,
            pad_id=model.pad_id,
        )
        texts += decode(model.tokenizer, completions.ids, completions.mask)
    return texts[: len(prompts)]


_generate = partial(jax.jit, static_argnames=("apply", "max_new_tokens", "eos_id", "pad_id", "top_p", "temperature"))(
    generate
)


def decode(tokenizer: Tokenizer, ids: jax.Array | np.ndarray, mask: jax.Array | np.ndarray) -> list[str]:
    """Decodes each row up to its end, without special tokens."""
    ids, mask = map(np.asarray, whole((ids, mask)))
    lengths = mask.sum(-1)
    rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)
