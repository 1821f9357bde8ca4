"""Runs that several tests look at, and programs that several runs share."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

CACHE_SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory):
    return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def compile_equal_programs_once(compiled_programs):
    """A resumed run, and a run with another reward, have programs that were compiled before."""
    before = {name: getattr(jax.config, name) for name in ("jax_compilation_cache_dir", *CACHE_SETTINGS)}
    for name, value in {"jax_compilation_cache_dir": compiled_programs, **CACHE_SETTINGS}.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
