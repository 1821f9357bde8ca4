"""What held-out text costs in bits per byte without a neural network: compressors, and counts of bytes."""

import bz2
import gzip
import lzma
from collections.abc import Callable

import numpy as np

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, 9),
    "bzip2": lambda data: bz2.compress(data, 9),
    "xz": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
}
MAX_ORDER = 8
"""So many bytes fit in one 64-bit code."""


def compressed_bits_per_byte(name: str, train: bytes, held_out: bytes) -> tuple[float, float]:
    """Bits per held-out byte of a compressor: (of the text alone, of what it adds behind the training text).

    The second is the fair comparison with a model. The window of gzip is 32 KiB and a block of bzip2 900 kB, so only
    xz, whose window of 64 MiB holds everything, gains much.
    """
    compress = COMPRESSORS[name]
    alone, before, after = (len(compress(data)) for data in (held_out, train, train + held_out))
    return 8 * alone / len(held_out), 8 * (after - before) / len(held_out)


def ngram_bits_per_byte(train: bytes, held_out: bytes, order: int) -> list[float]:
    """Bits per held-out byte under n-grams of bytes with Witten-Bell smoothing, for n = 1 … order.

    p_n(w | h) = (c(hw) + t(h) · p_{n-1}(w | h')) / (c(h) + t(h)), where h are the n - 1 bytes before w, h' is h without
    its first byte, c counts in the training text, t(h) is the number of different bytes after h, and p_0 = 1/256.
    The held-out text is read on from the end of the training text.

    Raises:
        ValueError: `order` is not in 1 … 8, or the training text is shorter than the order.

    References:
        Bell, Cleary & Witten, "Text Compression", 1990; Witten & Bell, "The zero-frequency problem", 1991, method C.
    """
    if not 1 <= order <= min(MAX_ORDER, len(train)):
        raise ValueError(f"order must be in 1 … {MAX_ORDER} and at most len(train), got {order}, {len(train)} bytes.")
    probability = np.full(len(held_out), 1 / 256)
    costs = []
    for n in range(1, order + 1):
        probability = _interpolate(probability, _codes(train, n), _codes(train[len(train) - n + 1 :] + held_out, n))
        costs.append(-float(np.mean(np.log2(probability))))
    return costs


def _codes(text: bytes, n: int) -> np.ndarray:
    """Each n bytes in a row as one number, the first byte the highest: [len(text) - n + 1]."""
    symbols = np.frombuffer(text, np.uint8).astype(np.uint64)
    code = np.zeros(len(text) - n + 1, np.uint64)
    for offset in range(n):
        code = (code << np.uint64(8)) | symbols[offset : offset + len(code)]
    return code


def _interpolate(lower: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """The probability of each held-out n-gram's last byte, from that under (n - 1)-grams and the training n-grams."""
    grams, counts = np.unique(train, return_counts=True)
    contexts, first, distinct = np.unique(grams >> np.uint64(8), return_index=True, return_counts=True)
    totals = np.add.reduceat(counts, first)
    gram_count = _look_up(held_out, grams, counts)
    context_count = _look_up(held_out >> np.uint64(8), contexts, totals)
    context_kinds = _look_up(held_out >> np.uint64(8), contexts, distinct)
    seen = context_count > 0
    mass = np.where(seen, context_count + context_kinds, 1)
    return np.where(seen, (gram_count + context_kinds * lower) / mass, lower)


def _look_up(keys: np.ndarray, table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The value of each key in a sorted table, 0 where it is not there."""
    index = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return np.where(table[index] == keys, values[index], 0)
