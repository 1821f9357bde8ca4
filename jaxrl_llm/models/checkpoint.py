"""Translates between the tensors of a Hugging Face checkpoint and our tree, given one table of names.

A `Layout` is the one place that knows both trees of an architecture. No files are touched here.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxrl_llm.types import Params

EMBEDDING = "token_embedding/embedding"
RUN_SETTINGS = ("dtype", "remat", "attention")
"""How to run a model, not what it is: config.json does not hold these fields."""


class Layout(NamedTuple):
    """The two names of everything in an architecture: Hugging Face's, in checkpoints, and ours.

    Attributes:
        names: Tensor in the file, without `prefix` -> our leaf. `*` is the layer: ours are stacked along the first axis.
            Leaves that a module does not have are skipped.
        transposed: The tensors that torch keeps as [outputs, inputs] and we as [inputs, outputs].
        prefix: What stands before the name of a tensor, save for those in `heads`.
        buffers: Tensors that old checkpoints store and that are no weights.
        heads: Tensors whose names have no prefix.
    """

    names: Mapping[str, str]
    transposed: frozenset[str]
    prefix: str
    buffers: re.Pattern[str]
    heads: Collection[str] = ("lm_head.weight", "score.weight")

    def of_scalar_head(self) -> "Layout":
        """The layout of the same architecture under a scalar head (`…ForSequenceClassification`)."""
        names = {name: f"backbone/{leaf}" for name, leaf in self.names.items()} | {"score.weight": "score/kernel"}
        return self._replace(names=names, transposed=self.transposed | {"score.weight"})


def leaf_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of each of our leaves, by its path; nothing is computed."""
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    leaves: dict[str, Any] = traverse_util.flatten_dict(variables["params"], sep="/")
    return {path: leaf.shape for path, leaf in leaves.items()}


def params_from_tensors(tensors: Mapping[str, np.ndarray], module: nn.Module, layout: Layout) -> Params:
    """Stacks the layers of a checkpoint into our tree, in float32.

    Args:
        tensors: All tensors of the checkpoint, with or without the prefix that some lack.
        module: The model to fill.
        layout: The names of its architecture.

    Raises:
        ValueError: If a tensor is missing, unexpected, of another shape or not finite, or if a tied head is not the
            embedding.
    """
    tensors = {name.removeprefix(layout.prefix): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if not layout.buffers.fullmatch(name)}
    shapes = leaf_shapes(module)
    rows = {name: leaf for name, leaf in layout.names.items() if leaf in shapes}
    _drop_tied_head(tensors, rows)
    _check_names("the weights", {file for row in rows.items() for file in _file_names(*row, shapes)}, tensors.keys())

    def take(name: str, shape: tuple[int, ...], transpose: bool) -> np.ndarray:
        tensor = tensors.pop(name)  # frees each layer once it is copied into the stack
        tensor = (tensor.T if transpose else tensor).astype(np.float32)
        if tensor.shape != shape:
            raise ValueError(f"{name} gives an array of shape {tensor.shape}, but the config asks for {shape}.")
        if not np.isfinite(tensor).all():
            raise ValueError(
                f"{name} has NaN or infinite weights: the run that saved it diverged, or the file is damaged."
            )
        return tensor

    leaves = {}
    for name, leaf in rows.items():
        transpose = name in layout.transposed
        if "*" in name:
            files = _file_names(name, leaf, shapes)
            leaves[leaf] = np.stack([take(file, shapes[leaf][1:], transpose) for file in files])
        else:
            leaves[leaf] = take(name, shapes[leaf], transpose)
    return traverse_util.unflatten_dict({path: jnp.asarray(leaf) for path, leaf in leaves.items()}, sep="/")


def tensors_from_params(params: Params, module: nn.Module, layout: Layout) -> dict[str, np.ndarray]:
    """Takes our tree apart into the tensors of a checkpoint, under the names that transformers has for them.

    Raises:
        ValueError: If a leaf is missing, unexpected or of another shape than the module's.
    """
    shapes = leaf_shapes(module)
    leaves = traverse_util.flatten_dict(params, sep="/")
    _check_names("params", shapes.keys(), leaves.keys())
    tensors = {}
    for name, leaf in layout.names.items():
        if leaf not in shapes:
            continue
        array = np.asarray(leaves[leaf])
        if array.shape != shapes[leaf]:
            raise ValueError(f"params at {leaf} have shape {array.shape}, but the module has {shapes[leaf]}.")
        array = array.swapaxes(-1, -2) if name in layout.transposed else array
        prefix = "" if name in layout.heads else layout.prefix
        layers = array if "*" in name else [array]
        for file, tensor in zip(_file_names(name, leaf, shapes), layers, strict=True):
            tensors[prefix + file] = np.ascontiguousarray(tensor)
    return tensors


def _file_names(name: str, leaf: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Lists the tensors behind one row of a layout."""
    return [name.replace("*", str(layer)) for layer in range(shapes[leaf][0])] if "*" in name else [name]


def _drop_tied_head(tensors: dict[str, np.ndarray], rows: Mapping[str, str]) -> None:
    """Removes a head that repeats the embedding, where the model has none of its own."""
    embedding = next(name for name, leaf in rows.items() if leaf.endswith(EMBEDDING))
    head = "lm_head.weight"
    has_own_head = head in rows or "score.weight" in rows
    if has_own_head or head not in tensors or embedding not in tensors:
        return
    if not np.array_equal(tensors.pop(head), tensors[embedding]):
        raise ValueError(
            f"{head} differs from {embedding}, but tie_word_embeddings is true, so that it would be lost. "
            "Pass tie_word_embeddings=False to keep it."
        )


def _check_names(what: str, expected: Collection[str], found: Collection[str]) -> None:
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unexpected:
        raise ValueError(
            f"{what} do not fit the model: {len(missing)} missing {missing[:5]}, "
            f"{len(unexpected)} unexpected {unexpected[:5]}. "
            "Check the number of layers and tie_word_embeddings in the config."
        )
