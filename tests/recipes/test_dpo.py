import dataclasses

import jax
import numpy as np
import pytest

from jaxrl_llm.data import preference_example, split_indices, tokenize_preference
from jaxrl_llm.models import from_pretrained
from jaxrl_llm.recipes.text import dpo, generate
from jaxrl_llm.recipes.text.language_model import load_model, load_rows
from tests.recipes.runs import (
    TINY,
    assert_close_weights,
    assert_complete_folder,
    assert_same_run,
    curve,
    press_ctrl_c_after,
    write_rows,
)

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Prefers 7 and few words to 3 and many; more held-out pairs than a batch has."""
    folder = tmp_path_factory.mktemp("dpo")
    rows = [
        {"prompt": f"{a}+{b}=", "chosen": "7" * (1 + b % 2), "rejected": "3" * (1 + a)}
        for a in range(4)
        for b in range(6)
    ]
    config = dpo.Config(
        **TINY,
        output_dir=str(folder / "whole"),
        dataset=write_rows(folder / "pairs.jsonl", rows),
        eval_fraction=0.25,
        per_device_train_batch_size=4,
        beta=0.5,
        learning_rate=5e-3,
        lr_scheduler_type="constant",  # so that the length of a run is no part of its program
        max_steps=12,
        logging_steps=1,
        eval_steps=6,
        save_steps=6,
    )
    return config, dpo.run(config)


def renamed(config, name, **changes):
    """The same settings in a folder of their own."""
    return dataclasses.replace(config, output_dir=config.output_dir.replace("/whole", f"/{name}"), **changes)


def test_a_run_separates_the_pairs_and_leaves_everything_behind(finished):
    config, figures = finished
    lines = curve(config.output_dir)
    assert figures["eval_loss"] < 0.4
    assert lines[0]["eval_rewards/accuracies"] == 0
    assert lines[-1]["rewards/accuracies"] == 1
    assert figures["eval_rewards/accuracies"] == pytest.approx(1)
    assert lines[-1]["rewards/margins"] > 1
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 6, 12]
    assert_complete_folder(config.output_dir, steps=[6, 12])
    (text,) = generate.run(generate.Config(model=figures["model"], prompt=("1+1=",), max_new_tokens=1))
    assert text != "3"


def test_at_the_start_the_loss_is_ln_2_and_nothing_is_rewarded(finished):
    before, first = curve(finished[0].output_dir)[:2]
    for line, prefix in ((before, "eval_"), (first, "")):
        assert line[f"{prefix}loss"] == pytest.approx(np.log(2), abs=1e-6)
        for name in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
            assert line[f"{prefix}{name}"] == pytest.approx(0, abs=1e-6)


def test_metrics_have_the_names_of_trl(finished):
    names = {"loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"}
    names |= {"logps/chosen", "logps/rejected"}
    last = curve(finished[0].output_dir)[-1]
    assert set(last) >= names | {f"eval_{name}" for name in names} | {"grad_norm", "learning_rate", "epoch"}


def test_rewards_are_sums_over_responses_against_the_frozen_start_and_evaluations_are_exact(finished):
    # 6 held-out pairs in batches of 4: the second is filled up, and what fills it does not count.
    config, figures = finished
    before = load_model(config, jax.random.split(jax.random.key(config.seed))[0])
    after = from_pretrained(figures["model"])
    rows = load_rows(config.dataset)
    held_out = split_indices(len(rows), held_out=0.25, seed=0)[1]
    pairs = [tokenize_preference(preference_example(rows[i]), before.tokenizer) for i in held_out]
    assert len(pairs) == 6

    def summed_log_probs(module, params, answers):
        logits_of = jax.jit(lambda tokens: module.apply({"params": params}, tokens)[0])
        sums = []
        for pair, answer in zip(pairs, answers, strict=True):
            ids = np.concatenate([pair.prompt_ids, answer])
            padded = np.pad(ids, (0, 16 - len(ids)))[None]
            logits = np.asarray(logits_of(padded)[0], np.float64)
            log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            positions = np.arange(len(pair.prompt_ids), len(ids))
            sums.append(log_probs[positions - 1, ids[positions]].sum())
        return np.array(sums)

    expected = {}
    for name in ("chosen", "rejected"):
        answers = [getattr(pair, f"{name}_ids") for pair in pairs]
        new = summed_log_probs(after[0], after[1], answers)
        expected[f"logps/{name}"] = new
        expected[f"rewards/{name}"] = config.beta * (new - summed_log_probs(before.module, before.params, answers))
    expected["rewards/margins"] = expected["rewards/chosen"] - expected["rewards/rejected"]
    expected["loss"] = np.log1p(np.exp(-expected["rewards/margins"]))
    expected["rewards/accuracies"] = expected["rewards/margins"] > 0
    for name, values in expected.items():
        assert figures[f"eval_{name}"] == pytest.approx(np.mean(values), abs=1e-5), name


def test_pairs_survive_micro_batches(finished):
    settings = {"optim": "sgd", "learning_rate": 0.2, "max_steps": 4}
    once = renamed(finished[0], "once", **settings)
    in_parts = renamed(finished[0], "in_parts", **settings, gradient_accumulation_steps=2)
    dpo.run(once)
    dpo.run(in_parts)
    for line, other in zip(curve(once.output_dir), curve(in_parts.output_dir), strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=2e-6)
    assert_close_weights(once.output_dir, in_parts.output_dir, atol=1e-6)
    assert curve(once.output_dir)[-1]["rewards/margins"] > 0.1


def test_a_run_stopped_by_ctrl_c_resumes_bit_for_bit(finished, monkeypatch, capsys):
    # The reference is the model of the start, which is no part of the checkpoint.
    whole, whole_figures = finished
    cut = renamed(whole, "cut")
    with monkeypatch.context() as patch:
        press_ctrl_c_after(patch, step=7)
        assert "model" not in dpo.run(cut)
    assert "Stopped after step 7 of 12; --resume goes on from here." in capsys.readouterr().out
    figures = dpo.run(dataclasses.replace(cut, resume=True))
    assert_same_run(whole.output_dir, cut.output_dir)
    del figures["model"]
    assert figures == {name: value for name, value in whole_figures.items() if name != "model"}


def test_one_epoch_is_the_default_length_of_a_run(finished):
    config = renamed(finished[0], "epoch", max_steps=0, num_train_epochs=0.5)
    dpo.run(config)
    lines = curve(config.output_dir)
    assert [line["step"] for line in lines] == [0, 1, 2]  # 18 pairs in batches of 4, half of them
    assert lines[-1]["epoch"] == pytest.approx(2 / 4.5)


def test_pairs_longer_than_the_model_reads_are_refused_with_a_cure(finished):
    config = renamed(finished[0], "long", n_positions=4)
    with pytest.raises(ValueError, match=r"n_positions=4 tokens, and 8 are needed: lower max_length, or give .*more"):
        dpo.run(config)
