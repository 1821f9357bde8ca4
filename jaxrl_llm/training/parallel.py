"""Many devices: one mesh, a table from the path of a parameter to the axes that divide it, and batches by rows.

    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state = shard(state, mesh)                            # parameters and optimizer state, by `RULES`
    step = jax.jit(make_train_step(loss_fn, optimizer), donate_argnums=0, out_shardings=(shardings(state, mesh), None))
    with jax.set_mesh(mesh):                              # so that activations stay spread over rows
        state, metrics = step(state, shard_batch(batch, mesh), key)

The step is the one for a single device: XLA finds from where its arguments lie what each device computes and what they
exchange. Axes of the mesh:

    data      each device has all parameters and some rows; gradients are summed
    fsdp      the same, but parameters, gradients and optimizer state are divided; a layer is gathered when it is needed
    tensor    a layer's outputs (of the next, its inputs) are divided: each device computes a part of every row

With several processes (`jax.distributed.initialize`) a mesh spans the devices of all; each process collates the rows of
its own devices, `local_rows`, and `shard_batch` joins them.

Other roads, with the same numbers: `pmap_step`, and `jax.shard_map` around `make_train_step(…, axis_name=…)`.

References:
    Rajbhandari et al., 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv 1910.02054;
    Shoeybi et al., 2019, "Megatron-LM", arXiv 1909.08053; Xu et al., 2021, "GSPMD", arXiv 2105.04663.
"""

import itertools
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxrl_llm.training.step import Batch, TrainState
from jaxrl_llm.types import MESH_AXES, ROW_AXES, Key, Metrics

_WIDENING = "(qkv|query|key|value|mlp_in|mlp_gate)"
_NARROWING = "(attention_out|mlp_out)"
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    ("token_embedding/embedding", PartitionSpec("tensor", "fsdp")),
    ("position_embedding/embedding", PartitionSpec(None, "fsdp")),
    ("lm_head/kernel", PartitionSpec("fsdp", "tensor")),
    (f"blocks/{_WIDENING}/kernel(/codes|/scales)?", PartitionSpec(None, "fsdp", "tensor")),
    (f"blocks/{_WIDENING}/bias", PartitionSpec(None, "tensor")),
    (f"blocks/{_WIDENING}/a", PartitionSpec(None, "fsdp", None)),
    (f"blocks/{_WIDENING}/b", PartitionSpec(None, None, "tensor")),
    (f"blocks/{_NARROWING}/kernel(/codes|/scales)?", PartitionSpec(None, "tensor", "fsdp")),
    (f"blocks/{_NARROWING}/a", PartitionSpec(None, "tensor", None)),
    (f"blocks/{_NARROWING}/b", PartitionSpec(None, None, "fsdp")),
    (r"hidden_\d+/kernel", PartitionSpec(None, "fsdp", "tensor")),  # of control: runs come first
)
"""End of a parameter's path -> how it is divided; all else (norms, small biases, scalars) is on every device."""


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Makes a mesh of the first devices there are, those of one process side by side along the last axes.

    Raises:
        ValueError: If a size is less than 1, or there are fewer devices; of several processes, all must be used.
    """
    sizes = data, fsdp, tensor
    if min(sizes) < 1:
        raise ValueError(f"mesh must have sizes of at least 1, got data={data}, fsdp={fsdp}, tensor={tensor}.")
    count = data * fsdp * tensor
    if count > jax.device_count() or (jax.process_count() > 1 and count != jax.device_count()):
        raise ValueError(
            f"mesh data={data},fsdp={fsdp},tensor={tensor} has {count} devices, and there are {jax.device_count()} in "
            f"{jax.process_count()} processes: the sizes must multiply to that, or to less in a single process. (A CPU "
            "gives more with XLA_FLAGS=--xla_force_host_platform_device_count=8.)"
        )
    return jax.make_mesh(sizes, MESH_AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:count])


def parse_mesh(text: str) -> Mesh | None:
    """Makes the mesh of a text such as `data=2,fsdp=4`; empty: None, for one device.

    Raises:
        ValueError: If it is not of that form, there are not so many devices, or several processes have none.
    """
    if not text and jax.process_count() > 1:
        raise ValueError(f"mesh must be given to {jax.process_count()} processes, such as data={jax.device_count()}.")
    if not text:
        return None
    found = re.findall(r"(?:^|,)(\w+)=(\d+)(?=,|$)", text)
    sizes = {name: int(size) for name, size in found}
    if (
        ",".join(f"{name}={size}" for name, size in found) != text
        or len(sizes) < len(found)
        or set(sizes) - {*MESH_AXES}
    ):
        raise ValueError(f"mesh must give sizes to some of {', '.join(MESH_AXES)}, as in data=2,fsdp=2, got {text!r}.")
    return make_mesh(**sizes)


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Finds how a leaf is divided: by the rule of its path, without the axes that do not divide its sizes.

    Args:
        path: Path of a parameter, or of what belongs to one in the state of an optimizer: `…/blocks/qkv/kernel`.
        shape: Its shape.
        mesh: The mesh.
    """
    for pattern, spec in RULES:
        if len(spec) == len(shape) and re.search(f"(^|/){pattern}$", path):
            return PartitionSpec(*(_fitting(size, axis, mesh) for size, axis in zip(shape, spec, strict=True)))
    return PartitionSpec()


def _fitting(size: int, axis: str | None, mesh: Mesh) -> str | None:
    return axis if axis is not None and size % mesh.shape[axis] == 0 else None


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Makes the sharding of each leaf of parameters, of a `TrainState`, or of any tree with their paths; shapes will do."""

    def place(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(name, np.shape(leaf), mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def shard(tree: Any, mesh: Mesh | None) -> Any:
    """Puts parameters or a training state on the devices of a mesh; without one it is returned as it is.

    Every process must hold the same values.
    """
    if mesh is None:
        return tree
    return jax.tree.map(_put, tree, shardings(tree, mesh))


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    values = np.asarray(leaf)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def num_shards(mesh: Mesh | None) -> int:
    """Counts the parts that the rows of a batch are divided into."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def local_rows(rows: int, mesh: Mesh | None) -> slice:
    """Tells which rows of a batch this process must bring.

    Raises:
        ValueError: If the mesh does not divide the rows, or gives this process rows that do not stand together.
    """
    if mesh is None:
        return slice(0, rows)
    if rows % num_shards(mesh):
        raise ValueError(f"mesh divides a batch into {num_shards(mesh)} parts, which do not divide its {rows} rows.")
    indices = NamedSharding(mesh, PartitionSpec(ROW_AXES)).addressable_devices_indices_map((rows,))
    spans = sorted({tuple(index[0].indices(rows)[:2]) for index in indices.values() if index is not None})
    if any(stop != start for (_, stop), (start, _) in itertools.pairwise(spans)):
        raise ValueError("mesh gives this process rows that do not stand together: let data and fsdp span the hosts.")
    return slice(spans[0][0], spans[-1][1])


def shard_batch(batch: Batch, mesh: Mesh | None, *, axis: int = 0) -> Batch:
    """Spreads the rows of a batch over a mesh; without one it is returned as it is.

    Args:
        batch: Arrays with the rows at `axis`: those of this process alone (all rows where there is but one process).
        mesh: The mesh.
        axis: Where the rows are; 1 for stacked batches.
    """
    if mesh is None:
        return batch
    sharding = NamedSharding(mesh, PartitionSpec(*(None,) * axis, ROW_AXES))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)


def whole(tree: Any) -> Any:
    """Brings arrays that are spread over several processes to each, as numpy arrays; all must call it. Others stay."""
    from jax.experimental import multihost_utils

    def fetch(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return multihost_utils.process_allgather(leaf, tiled=True)
        return leaf

    return jax.tree.map(fetch, tree)


def sum_over_processes(value: int) -> int:
    """Adds up a number that each process has of its own."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.asarray(value)).sum())


def wait_for_processes(name: str) -> None:
    """Waits until all processes are here; at once where there is but one."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def pmap_step(
    step: Callable[[TrainState, Batch, Key], tuple[TrainState, Metrics]], axis_name: str = "devices"
) -> Callable[[TrainState, Batch, Key], tuple[TrainState, Metrics]]:
    """Makes `jax.pmap` of a step of `make_train_step(…, axis_name=axis_name)` whose state goes in and out once.

    Args:
        step: The step.
        axis_name: The axis over which it sums.

    Returns:
        `step(state, batch, key)`: the state as one device has it, the rows of the batch divided evenly.

    Raises:
        ValueError: If there are not as many rows for each device (raised by the step).
    """
    mapped = jax.pmap(step, axis_name=axis_name, in_axes=(None, 0, None), out_axes=None)

    def divided(state: TrainState, batch: Batch, key: Key) -> tuple[TrainState, Metrics]:
        devices = jax.local_device_count()

        def split(x: Any) -> Any:
            if x.shape[0] % devices:
                raise ValueError(f"batch must have rows in a multiple of the {devices} devices, got {x.shape[0]}.")
            return x.reshape(devices, -1, *x.shape[1:])

        return mapped(state, jax.tree.map(split, batch), key)

    return divided
