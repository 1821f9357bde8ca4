"""Settings that make the tests stricter than users: set before jax is imported."""

import os
import signal
from pathlib import Path

from jaxrl_llm import xla_cpu

signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells tell jobs in the background to ignore

xla_cpu.set_flag()
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import jax
import pytest
from jax._src import compiler  # there is no public way to set XLA's options for all programs

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
hypothesis.settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("default")


SLOW = Path(__file__).parent / "slow.txt"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks the tests that slow.txt names: those that take long and have a quicker sister, which is run every time."""
    listed = set(SLOW.read_text("utf-8").splitlines())
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)
    files = {item.nodeid.split("::")[0] for item in items}
    if files >= {name.split("::")[0] for name in listed}:
        unknown = listed - {item.nodeid for item in items}
        assert not unknown, f"{SLOW} names tests that are not there: {sorted(unknown)}"


@pytest.fixture(scope="session", autouse=True)
def programs(tmp_path_factory):
    """Keeps compiled programs for as long as the tests run: many tests start a run that another has compiled before.

    Each worker has a folder of its own, so none reads what another has half written.
    """
    folder = str(tmp_path_factory.mktemp("programs"))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    return folder


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiles in a third of the time, for tests that compile a lot and compute little: LLVM does not optimize, and XLA
    emits its fusions as it did before it had MLIR for them.

    The last digits are others then, and it is not what users run: numbers to compare with those of others are made
    without it.
    """
    make_options = compiler.get_compile_options

    def options_of_quick_compilation(*args, env_options_overrides=None, **options):
        overrides = {"xla_cpu_use_fusion_emitters": False, **(env_options_overrides or {})}
        return make_options(*args, env_options_overrides=overrides, **options)

    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "get_compile_options", options_of_quick_compilation)
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
