import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrl_llm import cli
from jaxrl_llm.data import TokenBatch, preference_example, split_indices, tokenize_preference
from jaxrl_llm.models import ScalarHead, from_pretrained_reward_model, save_pretrained
from jaxrl_llm.recipes.options import ModelOptions
from jaxrl_llm.recipes.statistics import wilson_interval
from jaxrl_llm.recipes.text import reward_model
from jaxrl_llm.recipes.text.language_model import load_model, load_rows
from jaxrl_llm.recipes.text.scoring import text_rewards
from tests.recipes.runs import (
    TINY,
    assert_complete_folder,
    assert_same_run,
    curve,
    press_ctrl_c_after,
    words,
    write_rows,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "gpt2_reward"
SETTINGS = {
    "eval_fraction": 0.25,
    "per_device_train_batch_size": 4,
    "optim": "sgd",
    "learning_rate": 0.5,
    "lr_scheduler_type": "constant",
    "max_steps": 12,
    "logging_steps": 1,
    "eval_steps": 6,
    "save_steps": 6,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Prefers 7 to 3, by half a point or more; 6 held-out pairs, more than a batch has."""
    folder = tmp_path_factory.mktemp("reward")
    rows = [
        {"prompt": f"{a}+{b}=", "chosen": "7" * (1 + b % 2), "rejected": "3" * (1 + a), "margin": 0.5}
        for a in range(4)
        for b in range(6)
    ]
    config = reward_model.Config(
        **TINY,
        **SETTINGS,
        output_dir=str(folder / "whole"),
        dataset=write_rows(folder / "pairs.jsonl", rows),
    )
    return config, reward_model.run(config)


def renamed(config, name, **changes):
    """The same settings in a folder of their own."""
    return replace(config, output_dir=config.output_dir.replace("/whole", f"/{name}"), **changes)


def test_a_run_learns_the_preference_and_leaves_everything_behind(finished):
    config, figures = finished
    lines = curve(config.output_dir)
    assert lines[0]["eval_accuracy"] <= 0.5
    assert figures["eval_accuracy"] == pytest.approx(1)
    assert (figures["eval_accuracy_low"], figures["eval_accuracy_high"]) == wilson_interval(6, 6)
    assert figures["eval_loss"] < lines[0]["eval_loss"] / 2
    assert_complete_folder(config.output_dir, steps=[6, 12])


def test_metrics_have_the_names_of_trl(finished):
    names = {"loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward"}
    last = curve(finished[0].output_dir)[-1]
    steps = {"grad_norm", "learning_rate", "epoch", "num_tokens"}
    assert set(last) >= names | {f"eval_{name}" for name in names} | steps


def test_evaluations_are_those_of_the_saved_model_at_the_end_of_each_text(finished):
    # 6 held-out pairs in batches of 4: the second is filled up, and what fills it does not count.
    config, figures = finished
    module, params, tokenizer = from_pretrained_reward_model(figures["model"])
    rows = load_rows(config.dataset)
    held_out = split_indices(len(rows), held_out=0.25, seed=0)[1]
    pairs = [tokenize_preference(preference_example(rows[i]), tokenizer) for i in held_out]
    scores_of = jax.jit(lambda tokens: module.apply({"params": params}, tokens)[0])

    def reward(*parts):
        ids = np.concatenate(parts)
        assert ids[-1] == tokenizer.eos_token_id
        return scores_of(np.pad(ids, (0, 16 - len(ids)))[None])[0, len(ids) - 1]

    chosen = np.array([reward(pair.prompt_ids, pair.chosen_ids) for pair in pairs])
    rejected = np.array([reward(pair.prompt_ids, pair.rejected_ids) for pair in pairs])
    assert figures["eval_margin"] == pytest.approx(np.mean(chosen - rejected), rel=1e-5)
    assert figures["eval_loss"] == pytest.approx(np.mean(np.log1p(np.exp(0.5 - chosen + rejected))), rel=1e-5)
    assert figures["eval_min_reward"] == pytest.approx(min(*chosen, *rejected), rel=1e-5)


def test_a_run_stopped_by_ctrl_c_resumes_bit_for_bit(finished, monkeypatch):
    whole, whole_figures = finished
    cut = renamed(whole, "cut")
    with monkeypatch.context() as patch:
        press_ctrl_c_after(patch, step=7)
        assert "model" not in reward_model.run(cut)
    figures = reward_model.run(replace(cut, resume=True))
    assert_same_run(whole.output_dir, cut.output_dir)
    assert figures == {**whole_figures, "model": figures["model"]}


def test_pairs_survive_micro_batches(finished):
    in_parts = renamed(finished[0], "in_parts", gradient_accumulation_steps=2, max_steps=6)
    reward_model.run(in_parts)
    once = curve(finished[0].output_dir)[:7]
    for line, other in zip(once, curve(in_parts.output_dir), strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=1e-5)
    assert once[-1]["margin"] > 2 * once[1]["margin"]


def test_a_reward_model_is_trained_further(finished):
    config = renamed(finished[0], "further", model=finished[1]["model"], max_steps=1, num_samples=0)
    reward_model.run(config)
    assert curve(config.output_dir)[0]["eval_loss"] == pytest.approx(finished[1]["eval_loss"], rel=1e-6)


def test_ratings_are_learned_by_the_command_on_the_states_of_a_language_model(tmp_path, capsys):
    rows = [{"text": f"{a}+{b}", "rating": (a - 4.5) / 2} for a in range(10) for b in range(4)]
    model = load_model(ModelOptions(**TINY), jax.random.key(3))
    save_pretrained(tmp_path / "base", model.module, model.params, model.tokenizer)
    options = SETTINGS | {"optim": "adamw", "learning_rate": 2e-2, "dropout": 0.05}
    options |= {"per_device_train_batch_size": 10, "max_steps": 60, "eval_steps": 60, "logging_steps": 60}
    cli.main(
        [
            "reward-model",
            *words(
                **options,
                model=tmp_path / "base",
                dataset=write_rows(tmp_path / "ratings.jsonl", rows),
                output_dir=tmp_path / "run",
            ),
        ]
    )
    printed = capsys.readouterr().out
    assert "Reward model from ratings" in printed
    figures = {name: value for name, _, value in (line.strip().partition("  ") for line in printed.splitlines())}
    assert float(figures["eval_pearson"]) > 0.95
    first, *_, last = curve(tmp_path / "run")
    assert last["eval_mse"] == last["eval_loss"] < first["eval_mse"] / 10
    assert last["eval_mae"] < first["eval_mae"] / 3
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["architectures"] == ["GPT2ForSequenceClassification"]
    assert config["pad_token_id"] == model.tokenizer.pad_token_id


def test_the_reward_stands_where_transformers_looks_for_it():
    module, params, _ = from_pretrained_reward_model(GOLDEN)
    golden = np.load(GOLDEN / "golden.npz")
    tokens, mask = golden["tokens"].astype(np.int32), golden["mask"] != 0
    rewards = jax.jit(text_rewards, static_argnums=0)
    np.testing.assert_allclose(rewards(module, params, TokenBatch(tokens, mask, mask)), golden["scores"], atol=1e-5)

    # Where EOS serves as padding, transformers passes over it: it changes no reward.
    ends = np.arange(20) == 19 - mask[:, ::-1].argmax(1, keepdims=True)  # padding is on either side
    module = module.clone(backbone=module.backbone.clone(config=replace(module.backbone.config, pad_token_id=60)))
    without, with_eos = mask & ~ends, np.where(ends, 60, tokens)
    np.testing.assert_allclose(
        rewards(module, params, TokenBatch(with_eos, mask, mask)),
        rewards(module, params, TokenBatch(tokens, without, without)),
        rtol=1e-6,
    )


@pytest.mark.parity
@pytest.mark.parametrize("pad_token", ["<pad>", "<eos>"])
def test_transformers_gives_a_padded_batch_the_same_rewards(pad_token, tmp_path):
    import torch
    import transformers

    model = reward_model.load_reward_model(ModelOptions(**TINY), jax.random.key(0))
    tokenizer = model.tokenizer
    tokenizer.pad_token = pad_token
    module = ScalarHead(
        model.module.backbone.clone(config=replace(model.module.backbone.config, pad_token_id=tokenizer.pad_token_id))
    )
    save_pretrained(tmp_path, module, model.params, tokenizer)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    batch = tokenizer(["1+2=3<eos>", "4+5<eos>", "12345678<eos>"], padding=True, return_tensors="np")
    with torch.no_grad():
        inputs = {name: torch.tensor(batch[name]) for name in ("input_ids", "attention_mask")}
        expected = theirs(**inputs).logits[:, 0].numpy()
    mask = batch["attention_mask"] != 0
    rewards = text_rewards(module, model.params, TokenBatch(batch["input_ids"].astype(np.int32), mask, mask))
    np.testing.assert_allclose(rewards, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "1+1"}] * 2, r"line 1: a reward model cannot learn from the columns \['text'\]"),
        ([{"text": "1", "score": 1}, {"prompt": "1", "chosen": "2", "rejected": "3"}], "mixes pairs .* and ratings"),
        ([{"text": "1", "score": "good"}] * 2, "line 1: field `score` is str 'good'; expected a finite number"),
        ([], "has no rows"),
        ([{"text": "1+1+1", "score": 1}] * 2, "context_length=4 tokens, and 6 are needed: lower max_length"),
    ],
)
def test_data_that_cannot_be_learned_from_is_refused(rows, message, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    config = reward_model.Config(**TINY | {"n_positions": 4}, dataset=path, output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=message):
        reward_model.run(config)


def test_settings_that_do_not_fit_are_refused(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "1", "score": 1}] * 2)
    config = reward_model.Config(**TINY, dataset=path, center_rewards_coefficient=0.01)
    with pytest.raises(ValueError, match=r"center_rewards_coefficient=0.01 is for pairs; .* Leave it at 0"):
        reward_model.run(config)
    with pytest.raises(ValueError, match=r"center_rewards_coefficient must be at least 0, got -1\.0"):
        reward_model.run(replace(config, center_rewards_coefficient=-1.0))
