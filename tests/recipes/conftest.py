"""A run that several tests start from, and programs that several runs share."""

import contextlib

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxrl_llm.recipes.text import sft
from tests.recipes.runs import TINY, write_rows

CACHE = {"jax_persistent_cache_min_compile_time_secs": 0.1, "jax_persistent_cache_min_entry_size_bytes": 0}


@contextlib.contextmanager
def sharing_programs(folder):
    """A resumed run, and a run on other data, have programs that were compiled before."""
    settings = {"jax_compilation_cache_dir": folder, **CACHE}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    return str(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module")
def shared_programs(programs):
    with sharing_programs(programs):
        yield


@pytest.fixture(scope="session")
def tuned(programs, tmp_path_factory):
    """Settings and figures of SFT on sums of two digits, with more held-out rows than a batch has."""
    folder = tmp_path_factory.mktemp("tuned")
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(10) for b in range(10)]
    config = sft.Config(
        **TINY,
        output_dir=str(folder / "run"),
        dataset=write_rows(folder / "sums.jsonl", rows),
        eval_fraction=0.25,
        eval_exact_match=True,
        max_steps=100,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        warmup_steps=5,
        logging_steps=5,
        eval_steps=25,
        save_steps=40,
    )
    with sharing_programs(programs):
        return config, sft.run(config)
