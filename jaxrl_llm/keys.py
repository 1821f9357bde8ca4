"""Keys whose random numbers a CPU computes fast inside loops.

jax's default generator, Threefry 2×32, is 20 rounds of three whole-number operations. On CPUs jax compiles them as a loop,
which is quick to compile; but a loop is fused with nothing, and a step of an environment, or the sampling of a token, calls it
several times. `fast` gives the same key with the rounds written out: the same numbers, bit for bit, in one fused operation.

References:
    Salmon et al., 2011, Parallel random numbers: as easy as 1, 2, 3.
"""

import math

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl
from jaxtyping import Array, UInt32

from jaxrl_llm.types import Key

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def _threefry(key: UInt32[Array, " 2"], high: UInt32[Array, "..."], low: UInt32[Array, "..."]) -> tuple[Array, Array]:
    """Hashes counters of 64 bits, given as two halves."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    high, low = high + schedule[0], low + schedule[1]
    for turn in range(5):
        for rotation in _ROTATIONS[turn % 2]:
            high = high + low
            low = ((low << jnp.uint32(rotation)) | (low >> jnp.uint32(32 - rotation))) ^ high
        high = high + schedule[(turn + 1) % 3]
        low = low + schedule[(turn + 2) % 3] + jnp.uint32(turn + 1)
    return high, low


def _counters(shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Numbers the entries of an array, fewer than 2**32."""
    size = math.prod(shape)
    assert size < 2**32
    return jnp.zeros(shape, jnp.uint32), jax.lax.iota(jnp.uint32, size).reshape(shape)


def _seed(seed: Array) -> Array:
    return jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))


def _split(key: Array, shape: tuple[int, ...]) -> Array:
    return jnp.stack(_threefry(key, *_counters(shape)), axis=-1)


def _random_bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    high, low = _threefry(key, *_counters(shape))
    if bit_width == 64:
        return (high.astype(jnp.uint64) << jnp.uint64(32)) | low.astype(jnp.uint64)
    return (high ^ low).astype(jnp.dtype(f"uint{bit_width}"))


def _fold_in(key: Array, data: Array | int) -> Array:
    return jnp.stack(_threefry(key, jnp.uint32(0), jnp.asarray(data, jnp.uint32)))


_UNROLLED = define_prng_impl(
    key_shape=(2,),
    seed=_seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="threefry2x32_unrolled",
    tag="ufry",
)


def fast(key: Key) -> Key:
    """Gives a key, or an array of them, that makes the same random numbers, faster inside a loop on a CPU.

    A key of another generator than jax's default one comes back as it is.
    """
    if not jax.config.values["jax_threefry_partitionable"] or str(jax.random.key_impl(key)) != "threefry2x32":
        return key
    return jax.random.wrap_key_data(jax.random.key_data(key), impl=_UNROLLED)
