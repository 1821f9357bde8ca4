import json

import jax
import pytest

from benchmarks import offline_runs
from benchmarks.results import record
from jaxrl_llm.models import save_pretrained
from jaxrl_llm.recipes.options import ModelOptions
from jaxrl_llm.recipes.text.language_model import load_model
from tests.recipes.runs import TINY, write_rows


@pytest.mark.slow
def test_the_model_of_dpo_is_evaluated_against_what_it_began_as(tmp_path, capsys):
    for name, seed in (("vader_base", 0), ("dpo", 1)):
        options = ModelOptions(**TINY | {"n_positions": 96, "initializer_range": 0.4})
        model = load_model(options, jax.random.key(seed))
        save_pretrained(tmp_path / "runs" / name / "model", model.module, model.params, model.tokenizer)
    (tmp_path / "vader").mkdir()
    rows = [{"prompt": "<eos>", "chosen": f"{a}+{b}", "rejected": f"{a}={b}"} for a in range(4) for b in range(3)]
    write_rows(tmp_path / "vader/pairs_eval.jsonl", rows)
    config = offline_runs.Config(run="evaluate", data=tmp_path, runs=tmp_path / "runs")
    figures = offline_runs.RUNS["evaluate"](config)
    assert figures["rows"] == figures["before/rows"] == 12
    assert figures["kl"] > 0
    assert "before/kl" not in figures
    margin = figures["logps/chosen"] - figures["logps/rejected"]
    before = figures["before/logps/chosen"] - figures["before/logps/rejected"]
    assert figures["rewards/margins"] == pytest.approx(margin - before, abs=1e-4)
    assert [sample["chosen"] for sample in figures["samples"]] == ["0+0", "0+1", "0+2", "1+0", "1+1"]
    path = record("offline_evaluate", figures, folder=tmp_path)
    assert json.loads(path.read_text("utf-8"))["figures"].keys() == figures.keys()
