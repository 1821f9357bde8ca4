"""Settings that make the tests stricter than users: set before jax is imported."""

import os
import signal

from jaxrl_llm import xla_cpu

signal.signal(signal.SIGINT, signal.default_int_handler)  # which shells tell jobs in the background to ignore

xla_cpu.set_flag()
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
if "xla_backend_optimization_level" not in os.environ["XLA_FLAGS"]:
    # Tests compile a lot and compute little: without LLVM's optimizations they take half the time.
    os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)
hypothesis.settings.register_profile("default", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("default")
