"""Keeps the figures of a benchmark beside what made them: command, versions, processor, date.

record("dpo_vader", {"accuracy": 0.86, "accuracy/interval": [0.84, 0.88]}) writes benchmarks/results/dpo_vader.json.
"""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "numpy")


def record(
    name: str, figures: Mapping[str, Any], *, packages: Sequence[str] = (), folder: str | os.PathLike = FOLDER
) -> Path:
    """Writes the figures of a benchmark as JSON, with what is needed to make them again, and returns the file's path.

    Args:
        name: The file's name without ending: letters, digits, `_` and `-`.
        figures: Numbers and texts by name; lists and mappings of these, numpy's and jax's arrays too.
        packages: Further packages whose versions matter, beside those of `PACKAGES`.
        folder: Where to write.

    Raises:
        ValueError: The name is unfit, there are no figures, or one is NaN or infinite: a benchmark that failed.
        TypeError: A figure is no number, text, list or mapping.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"name must consist of letters, digits, `_` and `-`, got {name!r}.")
    if not figures:
        raise ValueError(f"figures of {name!r} must hold at least one number, got none.")
    content = {
        "name": name,
        "figures": _plain(figures, "figures"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in (*PACKAGES, *packages)},
        "cpu": {"model": cpu_model(), "cores": core_count()},
    }
    path = Path(folder) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return path


def cpu_model() -> str:
    """The processor's name: from /proc/cpuinfo on Linux, what Python knows elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and (found := re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)):
        return found[1]
    return platform.processor() or platform.machine()


def core_count() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plain(value: Any, where: str) -> Any:
    """Makes plain numbers of numpy's and jax's, and refuses those that are not finite, saying where they stand."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry, f"{where}[{name!r}]") for name, entry in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(entry, f"{where}[{index}]") for index, entry in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value}: a benchmark that failed has no result to keep.")
    if not isinstance(value, (str, bool, int, float, type(None))):
        raise TypeError(f"{where} must be a number, a text, a list or a mapping, got {type(value).__name__}.")
    return value
