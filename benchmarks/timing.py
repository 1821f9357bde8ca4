"""Times programs against peers, in turns, each in a process of its own; and measures what the machine can do at most.

A side is a command that runs one program several times and prints one line of JSON: it calls `report`. `race` starts the
sides one after the other, in several rounds, so that a slow minute of the machine meets all of them. This module imports jax
only where it measures the machine, for peers run where jax is not installed.
"""

import argparse
import importlib.metadata
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def timed(call: Callable[[], Any]) -> float:
    """Measures one call in seconds. The call must wait for its result (`jax.block_until_ready`)."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Runs a program once to warm up, then `repeats` times; returns the median of these."""
    call()
    return statistics.median(timed(call) for _ in range(repeats))


def report(call: Callable[[], Any], *, compile_seconds: float = 0.0, repeats: int = 3, packages: Sequence[str]) -> None:
    """Runs a program once to warm up, then `repeats` times, and prints its figures as one line of JSON.

    Args:
        call: Runs the program and waits for its result.
        compile_seconds: What compiling took before, where it can be told apart.
        repeats: Timed runs.
        packages: Whose versions matter.
    """
    first = timed(call)
    seconds = [timed(call) for _ in range(repeats)]
    report_seconds(seconds, compile_seconds=compile_seconds, first_seconds=first, packages=packages)


def report_seconds(
    seconds: Sequence[float], *, packages: Sequence[str], compile_seconds: float = 0.0, first_seconds: float = 0.0
) -> None:
    """Prints the figures of a program that was timed elsewhere, such as by a trainer's callback; see `report`."""
    figures = {
        "seconds": list(seconds),
        "compile_seconds": compile_seconds,
        "first_seconds": first_seconds,
        "peak_megabytes": max(resource.getrusage(who).ru_maxrss for who in WHO) / 1e3,
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }
    print(json.dumps(figures), flush=True)


def race(sides: Mapping[str, Sequence[str]], *, work: Mapping[str, float], rounds: int = 3) -> dict[str, dict]:
    """Runs the sides in turns and gathers their figures.

    Args:
        sides: The command of each by name; ours first. They run in the root of the repository.
        work: How much one run of each does, in the unit of the result (steps, tokens).
        rounds: How often each side is started.

    Returns:
        By side: the median of all its timed runs, in seconds, with `low` and `high`, their quartiles; `rate`, work by
        second; `ratio`, our rate over its; peak resident megabytes of its process; seconds of compiling; versions.
    """
    runs: dict[str, list[dict]] = {name: [] for name in sides}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    for _ in range(rounds):
        for name, command in sides.items():
            done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            runs[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(name, runs[name][-1], file=sys.stderr, flush=True)
    figures: dict[str, dict] = {}
    for name, found in runs.items():
        seconds = sorted(second for run in found for second in run["seconds"])
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        figures[name] = {
            "rate": work[name] / middle,
            "seconds": middle,
            "low": low,
            "high": high,
            "timed_runs": len(seconds),
            "compile_seconds": statistics.median(run["compile_seconds"] for run in found),
            "peak_megabytes": statistics.median(run["peak_megabytes"] for run in found),
            "versions": found[0]["versions"],
        }
    ours = next(iter(figures.values()))["rate"]
    return {name: {"rate": entry["rate"], "ratio": ours / entry["rate"]} | entry for name, entry in figures.items()}


def table(figures: Mapping[str, Mapping[str, Any]], unit: str) -> str:
    """Writes the result of a race as a table in Markdown."""
    lines = [
        f"| | {unit} | ours is faster by | seconds (quartiles) | compiling, s | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in figures.items():
        spread = f"{entry['seconds']:.3g} ({entry['low']:.3g} to {entry['high']:.3g})"
        columns = f"{entry['rate']:,.4g} | {entry['ratio']:.2f} × | {spread} | {entry['compile_seconds']:.0f}"
        lines.append(f"| {name} | {columns} | {entry['peak_megabytes']:,.0f} |")
    return "\n".join(lines)


def limits() -> dict[str, float]:
    """Measures what the machine can do at most: float32 matrix products, and reading memory; best of ten."""
    import jax
    import jax.numpy as jnp

    size = 2048
    square, long = jnp.ones((size, size)), jnp.ones(2**26)
    product, total = jax.jit(lambda x: x @ x), jax.jit(lambda x: x.reshape(64, -1).max(1))
    product(square).block_until_ready()
    total(long).block_until_ready()
    product_seconds = min(timed(lambda: product(square).block_until_ready()) for _ in range(10))
    read_seconds = min(timed(lambda: total(long).block_until_ready()) for _ in range(10))
    return {
        "matmul_gflops": 2 * size**3 / product_seconds / 1e9,
        "read_gb_per_second": long.nbytes / read_seconds / 1e9,
    }


def parser(description: str | None) -> argparse.ArgumentParser:
    """Makes the options that all races have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--peers", nargs="?", const=sys.executable, help="also the peers, with the Python that has them")
    made.add_argument("--rounds", type=int, default=3, help="how often each side is started")
    made.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    return made
