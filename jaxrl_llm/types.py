"""Names for the things that every module passes around.

Arrays live in `NamedTuple`s, settings in frozen dataclasses. Shapes stand in the annotations (jaxtyping); the tests
check them at every call, and in production they cost nothing. The letters of the shapes: `batch` rows (sequences),
`time` positions or environment steps, `vocab` entries, `hidden` features.
"""

from typing import Any, NamedTuple, TypeAlias

import jax
from jaxtyping import Array, Bool, Float, Int, Num, PRNGKeyArray, Shaped

from jaxrl_llm.xla_cpu import warn_if_miscompiling

warn_if_miscompiling()

Scalar: TypeAlias = Float[Array, ""]
"""A floating-point array of rank zero."""

Numeric: TypeAlias = int | float | Num[Array, ""]
"""A hyperparameter: a Python number, or a (possibly traced) scalar, so that it can be scheduled, vmapped or learned."""

Mask: TypeAlias = Shaped[Array, "..."]
"""Booleans or numbers, nonzero where an element counts."""

Params: TypeAlias = Any
"""A pytree of arrays: the inner tree of a model, without the `{"params": …}` around it."""

Metrics: TypeAlias = dict[str, Num[Array, ""]]
"""Scalars by name, without gradients. How one combines over micro-batches and devices is in its name: by minimum or
maximum if it says `min` or `max`, else it is a share, and shares add up (see `reductions.combine_metrics`)."""

Key: TypeAlias = PRNGKeyArray | jax.Array
"""A typed key, `jax.random.key(seed)`; it is consumed by the function that takes it."""

MESH_AXES = ("data", "fsdp", "tensor")
"""Axes of a mesh of devices, see `training.parallel`."""
ROW_AXES = ("data", "fsdp")
"""Those that divide the rows of a batch."""


class KVCache(NamedTuple):
    """Keys and values of the tokens that a model has seen, so that decoding need not compute them again.

    All rows are written together: slot `i` of every row holds its `i`-th written token, padding included. Left-pad the
    prompts, and rows of different lengths share one `length`.

    Attributes:
        keys: Key of each slot; zeros where nothing is written yet.
        values: Value of each slot.
        mask: True where a slot holds a real token; false for padding and for slots not written yet.
        length: Number of slots written.
    """

    keys: Float[Array, "layers batch kv_heads slots head_dim"]
    values: Float[Array, "layers batch kv_heads slots head_dim"]
    mask: Bool[Array, "batch slots"]
    length: Int[Array, ""]
