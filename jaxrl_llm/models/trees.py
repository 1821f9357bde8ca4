"""The leaves of a tree of parameters by their paths, such as `blocks/qkv/kernel`."""

import re
from typing import Any

from flax import traverse_util

from jaxrl_llm.types import Params


def flat_leaves(tree: Params) -> dict[str, Any]:
    """Lists the leaves of a tree by their paths, in the order that jax has for them."""
    leaves = traverse_util.flatten_dict(tree, sep="/").items()
    return dict(sorted(leaves, key=lambda leaf: leaf[0].split("/")))


def linear_kernels(params: Params) -> dict[str, Any]:
    """Finds the stacked kernels, by the paths of their layers."""
    leaves = flat_leaves(params).items()
    return {path.removesuffix("/kernel"): leaf for path, leaf in leaves if re.search(r"\bblocks/.*/kernel$", path)}
