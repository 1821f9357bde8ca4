import importlib.util
import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm import xla_cpu


def test_the_canary_of_the_miscompile_is_exactly_zero():
    hidden = jax.random.normal(jax.random.key(1), (2, 1024, 64))
    canary = jax.jit(lambda h: jnp.einsum("bnh,bha->bna", h, jnp.zeros((2, 64, 2))).sum(-1))
    for _ in range(5):
        np.testing.assert_array_equal(canary(hidden), np.zeros((2, 1024)))


def test_reductions_over_very_many_rows_are_right():
    # The other miscompile: the last of more than 32,768 rows came out wrong.
    matrix = jnp.ones((16, 64))
    row = jax.jit(jax.vmap(lambda x: jnp.sum((matrix @ x) ** 2)))
    np.testing.assert_array_equal(row(jnp.ones((40_000, 64))), np.full(40_000, 16 * 64.0**2))


@pytest.mark.parametrize(
    ("version", "affected"),
    [
        ("0.9.2", False),
        ("0.10.1", False),
        ("0.10.2", True),
        ("0.10.2.dev20260101", True),
        ("0.11.0", True),
        ("0.11.2", True),
        ("0.12.0", False),
        ("1.0", False),
    ],
)
def test_affected_releases_are_known(version, affected):
    assert xla_cpu.is_affected(version) == affected


def test_the_flag_is_appended_once_and_keeps_what_was_there(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp")
    xla_cpu.set_flag()
    xla_cpu.set_flag()
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=/tmp {xla_cpu.FLAG}"
    monkeypatch.delenv("XLA_FLAGS")
    xla_cpu.set_flag()
    assert os.environ["XLA_FLAGS"] == xla_cpu.FLAG


@pytest.fixture
def affected(monkeypatch):
    """An affected jaxlib on CPU, without the flag."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.10.2")
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def test_an_affected_jaxlib_is_warned_of_with_the_cure(affected):
    with pytest.warns(RuntimeWarning, match=rf"jaxlib 0\.10\.2 miscompiles .* XLA_FLAGS={xla_cpu.FLAG} .* 0\.10\.1"):
        xla_cpu.warn_if_miscompiling()


@pytest.mark.parametrize(
    ("name", "value"), [("XLA_FLAGS", xla_cpu.FLAG), ("JAX_PLATFORMS", "cuda"), ("JAX_PLATFORMS", "tpu,cpu")]
)
def test_there_is_no_warning_with_the_flag_or_on_another_platform(affected, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        xla_cpu.warn_if_miscompiling()


def test_there_is_no_warning_for_a_clean_jaxlib(affected, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.10.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        xla_cpu.warn_if_miscompiling()


@pytest.mark.parametrize(("plugins", "libtpu"), [([], False), (["cuda"], False), ([], True)])
def test_without_a_choice_jax_runs_on_cpu_only_where_no_accelerator_is_installed(monkeypatch, plugins, libtpu):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: libtpu or None)
    assert xla_cpu.runs_on_cpu() == (not plugins and not libtpu)


def test_importing_the_library_warns_once():
    program = (
        "from jaxrl_llm import xla_cpu; xla_cpu.importlib.metadata.version = lambda name: '0.10.2'\n"
        "import jaxrl_llm.types, jaxrl_llm.losses, jaxrl_llm.advantages"
    )
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-W", "always", "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert run.stderr.count("RuntimeWarning: jaxlib 0.10.2 miscompiles") == 1
