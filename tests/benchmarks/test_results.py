import doctest
import importlib.metadata
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import results
from benchmarks.results import record


def test_the_examples_run():
    assert doctest.testmod(results).failed == 0


def test_figures_are_kept_beside_what_made_them(tmp_path):
    figures = {"accuracy": np.float32(0.5), "curve": jnp.arange(3), "runs": [{"beta": 0.1, "steps": np.int64(7)}]}
    path = record("dpo_vader", figures, packages=("optax",), folder=tmp_path / "results")
    content = json.loads(path.read_text("utf-8"))
    assert path == tmp_path / "results" / "dpo_vader.json"
    assert content["figures"] == {"accuracy": 0.5, "curve": [0, 1, 2], "runs": [{"beta": 0.1, "steps": 7}]}
    assert set(content["versions"]) == {"python", "jax", "jaxlib", "numpy", "optax"}
    assert content["versions"]["optax"] == importlib.metadata.version("optax")
    assert content["command"].startswith("python ")
    assert content["cpu"]["cores"] >= 1
    assert content["cpu"]["model"]
    assert len(content["date"]) == 10


@pytest.mark.parametrize("value", [math.nan, np.inf, np.array([1.0, np.nan])])
def test_a_figure_that_is_not_finite_is_refused_with_its_place(tmp_path, value):
    with pytest.raises(ValueError, match=r"figures\['dpo'\]\['kl'\].* must be finite, got (nan|inf)"):
        record("kl", {"dpo": {"kl": value}}, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_figure_that_json_cannot_hold_is_refused():
    with pytest.raises(TypeError, match=r"figures\['model'\] must be a number, .* got object"):
        record("model", {"model": object()})


@pytest.mark.parametrize("name", ["", "a/b", "dpo vader", "../up"])
def test_a_name_that_is_no_plain_file_name_is_refused(name):
    with pytest.raises(ValueError, match="name must consist of"):
        record(name, {"loss": 1.0})


def test_no_figures_are_no_result():
    with pytest.raises(ValueError, match="must hold at least one number"):
        record("empty", {})
