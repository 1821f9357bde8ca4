"""Guards against the XLA:CPU miscompile of jaxlib 0.10.2 and 0.11.

From jaxlib 0.10.2 on, XLA's CPU backend fuses dots through YNNPACK, and two patterns give silently wrong numbers: a
batched dot with a compile-time zero operand followed by a reduction, and reductions over very many rows. An empty
`--xla_cpu_experimental_ynn_fusion_type=` in `XLA_FLAGS`, set before jax starts its backend, cures both and costs no
speed. This module is the one place that knows about it; it imports no jax.
"""

import importlib.metadata
import importlib.util
import os
import warnings

FLAG = "--xla_cpu_experimental_ynn_fusion_type="
FIRST_AFFECTED, FIRST_UNTESTED = (0, 10, 2), (0, 12)


def is_affected(jaxlib_version: str) -> bool:
    """Tells whether this release of jaxlib is known to miscompile on CPU.

    Example:
        >>> is_affected("0.10.1"), is_affected("0.10.2"), is_affected("0.11.2")
        (False, True, True)
    """
    release = tuple(int(part) for part in jaxlib_version.split(".")[:3] if part.isdigit())
    return FIRST_AFFECTED <= release < FIRST_UNTESTED


def set_flag() -> None:
    """Appends the cure to `XLA_FLAGS`; call it before jax is imported. Flags that are there already are kept."""
    flags = os.environ.get("XLA_FLAGS", "")
    if FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {FLAG}".strip()


def runs_on_cpu() -> bool:
    """Tells, without starting a backend, whether jax will compute on CPU.

    It will if `JAX_PLATFORMS` names cpu first, or if it names nothing and no accelerator plugin is installed.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0].strip() == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None


def warn_if_miscompiling() -> None:
    """Warns, with the cure, if jax runs on CPU with an affected jaxlib and without the flag."""
    version = importlib.metadata.version("jaxlib")
    if is_affected(version) and FLAG not in os.environ.get("XLA_FLAGS", "") and runs_on_cpu():
        warnings.warn(
            f"jaxlib {version} miscompiles some programs on CPU, silently. Set the environment variable "
            f"XLA_FLAGS={FLAG} (with nothing after the equals sign) before jax is imported, or use jaxlib 0.10.1.",
            RuntimeWarning,
            stacklevel=2,
        )
