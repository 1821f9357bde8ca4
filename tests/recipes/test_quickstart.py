import base64
import html
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl_llm.data import prompt_example, split_indices, tokenize_prompt
from jaxrl_llm.recipes import quickstart
from jaxrl_llm.recipes.options import ModelOptions
from jaxrl_llm.recipes.quickstart import Config
from jaxrl_llm.recipes.text.language_model import complete, load_model, load_rows
from jaxrl_llm.training.logging import read_metrics


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    return folder, quickstart.run(Config(output_dir=str(folder), sft_steps=30, grpo_steps=2, ppo_timesteps=4096))


def share_right(folder):
    """Greedy completions of all held-out sums, compared as text."""
    model = load_model(ModelOptions(model=str(folder)), jax.random.key(0))
    rows = load_rows("sums")
    held_out = [rows[i] for i in split_indices(len(rows), held_out=quickstart.HELD_OUT, seed=0)[1]]
    assert len(held_out) == 512
    prompts = [tokenize_prompt(prompt_example(row).prompt, model.tokenizer) for row in held_out]
    texts = complete(model, model.params, prompts, jax.random.key(0), max_new_tokens=4)
    return np.mean([text == row.fields["answer"] for text, row in zip(texts, held_out, strict=True)])


def test_all_three_runs_leave_their_metrics_models_and_pictures(finished):
    folder, figures = finished
    assert {path.name for path in folder.iterdir()} == {"sft", "grpo", "ppo", "sft.png", "grpo.png", "report.html"}
    for name, last_step in (("sft", 30), ("grpo", 2)):
        assert read_metrics(folder / name)[-1]["step"] == last_step
        assert (folder / name / "model" / "model.safetensors").is_file()
    assert read_metrics(folder / "ppo")[-1]["timesteps"] == 4096
    assert figures["report"] == str(folder / "report.html")
    assert figures["seconds"] > 0


def test_the_figures_are_those_of_the_saved_models_on_512_held_out_sums(finished):
    folder, figures = finished
    assert figures["sft_exact_match"] == pytest.approx(share_right(folder / "sft" / "model"))
    assert figures["grpo_exact_match"] == pytest.approx(share_right(folder / "grpo" / "model"))
    assert figures["grpo_exact_match"] == pytest.approx(read_metrics(folder / "grpo")[-1]["eval_reward"])
    assert figures["sft_exact_match"] > 0


def test_the_report_holds_the_measured_figures_the_pictures_and_twelve_sums(finished):
    folder, figures = finished
    report = Path(figures["report"]).read_text("utf-8")
    cells = [html.unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", report, re.DOTALL)]
    before = read_metrics(folder / "grpo")[0]["eval_reward"]
    untrained = read_metrics(folder / "ppo")[0]["eval/sampled_return"]
    assert cells[:12] == [
        *["SFT", "held-out sums right, greedy", "0.000", f"{figures['sft_exact_match']:.3f}"],
        *["GRPO", "held-out sums right, greedy", f"{before:.3f}", f"{figures['grpo_exact_match']:.3f}"],
        *["PPO", "return on CartPole-v1, sampled, of 500", f"{untrained:.1f}", f"{figures['ppo_return']:.1f}"],
    ]
    assert len(cells) == 12 + 12 * 4
    for prompt, answer in zip(cells[12::4], cells[13::4], strict=True):
        assert eval(prompt.removesuffix("=")) == int(answer)
    pictures = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", report)]
    files = [folder / "sft.png", folder / "grpo.png", folder / "ppo" / "learning_curve.png"]
    assert pictures == [path.read_bytes() for path in files]
    assert not re.search(r"(src|href)=\"(?!data:)", report)


@pytest.mark.parametrize("stopped", ["sft", "grpo", "ppo"])
def test_a_run_that_was_stopped_ends_the_quickstart(monkeypatch, tmp_path, stopped):
    started = []

    def stage(name, figures):
        def run(config):
            started.append(name)
            return {} if name == stopped else figures

        return run

    figures = {"model": "none"}
    for name in ("sft", "grpo", "ppo"):
        monkeypatch.setattr(getattr(quickstart, name), "run", stage(name, figures))
    assert quickstart.run(Config(output_dir=str(tmp_path))) == {}
    assert started[-1] == stopped


@pytest.mark.slow
def test_the_defaults_reach_the_promised_figures(tmp_path):
    figures = quickstart.run(Config(output_dir=str(tmp_path / "run")))
    assert figures["sft_exact_match"] >= 0.40
    assert figures["grpo_exact_match"] >= 0.70
    assert figures["ppo_return"] == 500
