"""Kernels held at 4 or 8 bits: the frozen base of QLoRA.

A kernel is cut into blocks of 64 inputs of one output. A block keeps its largest absolute value s, and for each weight w a
code: of NF4 the place of the nearest of 16 values to w / s, which are quantiles of a normal distribution; of int8
round(127 w / s). With double quantisation the s are held at 8 bits themselves, less their mean, in blocks of 256.

    params = adapt(key, quantize_params(params), LoraConfig(r=8))    # as with plain parameters from here on
    params = quantize_params(params, "nf4", use_double_quant=True)   # 4.13 bits for a weight, instead of 4.5

A linear layer makes its kernel anew in each pass, forward and backward, and keeps none. Gradients flow through it, not
into it. Two codes share a byte: an array of `jnp.uint4` would take a byte for each on a CPU (jaxlib 0.10; what
`memory_analysis` says there holds for other devices), which is why qwix's arrays are not used.

References:
    Dettmers et al., 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3. The values of NF4
    are those of bitsandbytes. The paper keeps the s in 8-bit floats; whole numbers, as here, lie closer to them.
"""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jaxtyping import Array, Float

from jaxrl_llm.models.trees import flat_leaves, linear_kernels
from jaxrl_llm.types import Params

QuantType = Literal["nf4", "int8"]

NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""What a code of NF4 stands for, in units of the largest absolute value of the block."""
BLOCK_SIZE, SCALE_BLOCK_SIZE = 64, 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantised kernel, [..., inputs, outputs]; the arrays below have the same leading axes.

    Attributes:
        codes: NF4: [..., rows / 2, outputs] in uint8, rows 2i and 2i + 1 in the low and the high half of a byte; int8:
            [..., rows, outputs]. Rows are the inputs, filled up to whole blocks.
        scales: Largest absolute value of each block, [..., rows / block_size, outputs] in float32; with double
            quantisation their codes, [..., 256-blocks, 256] in int8.
        nested: With double quantisation the scale of each 256-block of `scales` [..., 256-blocks], and their mean [...].
        inputs: Inputs of the kernel.
        block_size: Inputs that share a scale.
        quant_type: What the codes are.
    """

    codes: Any
    scales: Any
    nested: tuple[Any, Any] | None
    inputs: int = dataclasses.field(metadata={"static": True})
    block_size: int = dataclasses.field(metadata={"static": True})
    quant_type: QuantType = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return (*self.codes.shape[:-2], self.inputs, self.codes.shape[-1])

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def quantize(
    kernel: Float[Array, "*layers inputs outputs"],
    quant_type: QuantType = "nf4",
    *,
    block_size: int = BLOCK_SIZE,
    use_double_quant: bool = False,
) -> Quantized:
    """Quantises a kernel, or a stack of kernels.

    Args:
        kernel: What to quantise.
        quant_type: `nf4` (4 bits) or `int8`.
        block_size: Inputs that share a scale, even; a kernel with fewer inputs is one block.
        use_double_quant: Keep the scales at 8 bits too.

    Raises:
        ValueError: If `quant_type` is unknown, or `block_size` is odd or less than 2.

    Example:
        >>> kernel = jax.random.normal(jax.random.key(0), (128, 32))
        >>> quantized = quantize(kernel)
        >>> quantized.codes.shape, quantized.scales.shape
        ((64, 32), (2, 32))
        >>> error = jnp.abs(dequantize(quantized) - kernel).mean() / jnp.abs(kernel).mean()
        >>> bool(error < 0.1)
        True
    """
    if quant_type not in get_args(QuantType):
        raise ValueError(f"quant_type must be one of {get_args(QuantType)}, got {quant_type!r}.")
    if block_size < 2 or block_size % 2:
        raise ValueError(f"block_size must be even and at least 2, got {block_size}.")
    inputs = kernel.shape[-2]
    block_size = min(block_size, inputs + inputs % 2)
    blocks = _in_blocks(jnp.asarray(kernel, jnp.float32), -2, block_size)
    scales = jnp.abs(blocks).max(-2)
    units = blocks / jnp.where(scales == 0, 1, scales)[..., None, :]
    units = units.reshape(*kernel.shape[:-2], -1, kernel.shape[-1])
    codes = _nearest_nf4(units) if quant_type == "nf4" else _nearest_int8(units)
    nested = None
    if use_double_quant:
        scales, outer, mean = _quantize_scales(scales)
        nested = outer, mean
    return Quantized(codes, scales, nested, inputs, block_size, quant_type)


def dequantize(kernel: Quantized | Array) -> Array:
    """Makes a kernel of what `quantize` kept of it, in float32; a plain one is returned as it is."""
    if not isinstance(kernel, Quantized):
        return kernel
    units = _nf4_values(kernel.codes) if kernel.quant_type == "nf4" else kernel.codes.astype(jnp.float32) / 127
    leading, (rows, outputs) = units.shape[:-2], units.shape[-2:]
    blocks = units.reshape(*leading, rows // kernel.block_size, kernel.block_size, outputs)
    scales = kernel.scales
    if kernel.nested is not None:
        scales = _dequantize_scales(scales, *kernel.nested, blocks.shape[-3] * outputs)
        scales = scales.reshape(*leading, -1, outputs)
    return (blocks * scales[..., None, :]).reshape(*leading, rows, outputs)[..., : kernel.inputs, :]


def quantize_params(
    params: Params,
    quant_type: QuantType = "nf4",
    *,
    block_size: int = BLOCK_SIZE,
    use_double_quant: bool = False,
) -> Params:
    """Quantises the kernels of all blocks; embeddings, norms, biases and heads stay as they are and are shared.

    Args:
        params: Plain parameters of a decoder or a `ScalarHead`. The model's `apply` takes the result too.
        quant_type: As in `quantize`.
        block_size: As in `quantize`.
        use_double_quant: As in `quantize`.

    Raises:
        ValueError: As `quantize`.
    """
    options: dict[str, Any] = {"block_size": block_size, "use_double_quant": use_double_quant}
    kernels = {f"{path}/kernel": quantize(leaf, quant_type, **options) for path, leaf in linear_kernels(params).items()}
    return traverse_util.unflatten_dict(flat_leaves(params) | kernels, sep="/")


def _in_blocks(x: Array, axis: int, size: int) -> Array:
    """Splits an axis, given from the end, into [blocks, size]; zeros fill the last block up."""
    axis += x.ndim
    x = jnp.pad(x, [(0, -x.shape[axis] % size if i == axis else 0) for i in range(x.ndim)])
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def _nearest_nf4(units: Array) -> Array:
    """Finds the nearest value of NF4 to each number in [-1, 1], two codes to a byte."""
    values = np.asarray(NF4, np.float32)
    codes = jnp.searchsorted(jnp.asarray((values[1:] + values[:-1]) / 2), units).astype(jnp.uint8)
    return codes[..., ::2, :] | codes[..., 1::2, :] << 4


def _nf4_values(codes: Array) -> Array:
    pairs = jnp.stack([codes & 15, codes >> 4], axis=-2)
    return jnp.asarray(NF4, jnp.float32)[pairs.reshape(*codes.shape[:-2], -1, codes.shape[-1])]


def _nearest_int8(units: Array) -> Array:
    return jnp.round(127 * units).astype(jnp.int8)


def _quantize_scales(scales: Array) -> tuple[Array, Array, Array]:
    """Returns codes [..., blocks, 256], the scale of each block, and the mean that all are relative to."""
    mean = scales.mean((-2, -1))
    blocks = _in_blocks((scales - mean[..., None, None]).reshape(*scales.shape[:-2], -1), -1, SCALE_BLOCK_SIZE)
    outer = jnp.abs(blocks).max(-1)
    return _nearest_int8(blocks / jnp.where(outer == 0, 1, outer)[..., None]), outer, mean


def _dequantize_scales(codes: Array, outer: Array, mean: Array, count: int) -> Array:
    scales = codes.astype(jnp.float32) / 127 * outer[..., None] + mean[..., None, None]
    return scales.reshape(*codes.shape[:-2], -1)[..., :count]
