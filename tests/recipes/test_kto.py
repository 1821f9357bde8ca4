import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data import split_indices, tokenize_unpaired_rows, unpaired_examples
from jaxrl_llm.models import from_pretrained
from jaxrl_llm.recipes.text import kto
from jaxrl_llm.recipes.text.language_model import load_model, load_rows
from jaxrl_llm.recipes.text.offline import run_keys
from tests.recipes.runs import (
    TINY,
    assert_close_weights,
    assert_complete_folder,
    assert_same_run,
    curve,
    press_ctrl_c_after,
    renamed,
    token_log_probs,
    write_rows,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Likes 7 and few words, dislikes 3 and many; more held-out rows than a batch has."""
    folder = tmp_path_factory.mktemp("kto")
    rows = [
        {"prompt": f"{a}+{b}=", "completion": ("7" if b % 3 else "3") * (1 + a), "label": bool(b % 3)}
        for a in range(4)
        for b in range(9)
    ]
    config = kto.Config(
        **TINY,
        output_dir=str(folder / "whole"),
        dataset=write_rows(folder / "labelled.jsonl", rows),
        eval_fraction=0.25,
        per_device_train_batch_size=6,
        beta=0.5,
        undesirable_weight=2.0,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_steps=12,
        logging_steps=1,
        eval_steps=6,
        save_steps=6,
        num_samples=0,
    )
    return config, kto.run(config)


def test_a_run_tells_the_good_from_the_bad_and_leaves_everything_behind(finished):
    config, figures = finished
    lines = curve(config.output_dir)
    assert figures["eval_loss"] < 0.8 * lines[0]["eval_loss"]
    assert figures["eval_rewards/margins"] > 0.5
    assert lines[-1]["rewards/margins"] > 0.5
    assert max(line.get("kl", 0) for line in lines) > 0
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 6, 12]
    assert_complete_folder(config.output_dir, steps=[6, 12])


def test_metrics_have_the_names_of_trl(finished):
    names = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "kl"}
    names |= {"logits/chosen", "logits/rejected", "entropy"}
    last = curve(finished[0].output_dir)[-1]
    steps = {"grad_norm", "learning_rate", "epoch", "num_tokens"}
    assert set(last) >= names | {f"eval_{name}" for name in names} | steps


def tokenized_rows(config):
    """Rows to train on and held-out ones, tokenized; the latter sorted by prompt, as a run has them."""
    rows = load_rows(config.dataset)
    tokenizer = load_model(config, run_keys(config.seed)[0]).tokenizer
    parts = split_indices(len(rows), held_out=0.25, seed=0)
    examples = ([example for i in part for example in unpaired_examples(rows[i])] for part in parts)
    train, held_out = (tokenize_unpaired_rows(part, tokenizer).rows for part in examples)
    return train, sorted(held_out, key=lambda row: row.prompt_ids.tobytes())


def test_tokens_are_counted_with_their_prompts_and_without_the_mismatched(finished):
    config, _ = finished
    one_epoch = sum(len(row.prompt_ids) + len(row.completion_ids) for row in tokenized_rows(config)[0])
    lines = {line["step"]: line for line in curve(config.output_dir)}
    assert lines[9]["num_tokens"] == 2 * one_epoch  # 9 batches of 6 are 27 rows twice


def test_token_metrics_are_means_over_the_tokens_of_each_class(finished):
    config, figures = finished
    module, params, _ = from_pretrained(figures["model"])
    logits_of = jax.jit(lambda tokens: module.apply({"params": params}, tokens)[0][0])
    sums = {True: np.zeros(3), False: np.zeros(3)}  # of the mean logit, of the entropy, and the number of tokens
    for row in tokenized_rows(config)[1]:
        ids = np.concatenate([row.prompt_ids, row.completion_ids])
        padded = np.pad(ids[:-1], (0, 16 - len(ids) + 1))[None]
        logits = np.asarray(logits_of(padded), np.float64)
        logits = logits[len(row.prompt_ids) - 1 : len(ids) - 1]  # they predict the completion
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        entropy = -(np.exp(log_probs) * log_probs).sum(-1)
        sums[row.label] += [logits.mean(-1).sum(), entropy.sum(), len(entropy)]
    good, bad = sums[True], sums[False]
    assert good[2] != bad[2]
    assert figures["eval_logits/chosen"] == pytest.approx(good[0] / good[2], abs=1e-5)
    assert figures["eval_logits/rejected"] == pytest.approx(bad[0] / bad[2], abs=1e-5)
    assert figures["eval_entropy"] == pytest.approx((good[1] + bad[1]) / (good[2] + bad[2]), abs=1e-5)


def test_evaluations_are_exact_with_the_reference_point_of_each_batch(finished):
    config, figures = finished
    before = load_model(config, run_keys(config.seed)[0])
    after = from_pretrained(figures["model"])[1]
    tokens = tokenized_rows(config)[1]
    assert len(tokens) == 9 > config.per_device_train_batch_size

    def log_ratios(completions):
        texts = [np.concatenate([row.prompt_ids, ids]) for row, ids in zip(tokens, completions, strict=True)]
        new, old = token_log_probs(before, after, texts), token_log_probs(before, before.params, texts)
        return np.array([(n - o)[3:].sum() for n, o in zip(new, old, strict=True)])  # prompts have 4 tokens

    completions = [row.completion_ids for row in tokens]
    ratios, mismatched = log_ratios(completions), log_ratios([completions[-1], *completions[:-1]])
    points = np.repeat([max(mismatched[:6].mean(), 0), max(mismatched[6:].mean(), 0)], [6, 3])
    good, above = np.array([row.label for row in tokens]), config.beta * (ratios - points)
    losses = np.where(good, 1 / (1 + np.exp(above)), 2 / (1 + np.exp(-above)))
    expected = {
        "loss": losses.mean(),
        "kl": points.mean(),
        "rewards/chosen": config.beta * ratios[good].mean(),
        "rewards/rejected": config.beta * ratios[~good].mean(),
    }
    for name, value in expected.items():
        assert figures[f"eval_{name}"] == pytest.approx(value, abs=1e-5), name


def test_responses_survive_micro_batches_with_one_reference_point(finished):
    whole, _ = finished
    in_parts = renamed(whole, "in_parts", gradient_accumulation_steps=3)
    kto.run(in_parts)
    for line, other in zip(curve(whole.output_dir), curve(in_parts.output_dir), strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=5e-6)
    assert_close_weights(whole.output_dir, in_parts.output_dir, atol=2e-6)


def test_a_run_stopped_by_ctrl_c_resumes_bit_for_bit(finished, monkeypatch):
    whole, whole_figures = finished
    cut = renamed(whole, "cut")
    with monkeypatch.context() as patch:
        press_ctrl_c_after(patch, step=7)
        assert "model" not in kto.run(cut)
    figures = kto.run(dataclasses.replace(cut, resume=True))
    assert_same_run(whole.output_dir, cut.output_dir)
    assert figures == whole_figures | {"model": figures["model"]}


@pytest.fixture
def task_of(finished, monkeypatch):
    """Makes the task of a run without training."""

    def make(**changes):
        tasks = []
        with monkeypatch.context() as patch:
            patch.setattr(kto, "train_offline", lambda config, model, task, reference: (tasks.append(task), {}))
            kto.run(dataclasses.replace(finished[0], **changes))
        return tasks[0]

    return make


def test_completions_are_exchanged_between_different_prompts_though_pairs_are_given(task_of, tmp_path):
    rows = [{"prompt": f"{a}+", "chosen": f"{a}7", "rejected": f"{a}33"} for a in range(6)]
    task = task_of(dataset=write_rows(tmp_path / "pairs.jsonl", rows), eval_fraction=0.34)
    assert (len(task.train), len(task.held_out)) == (8, 4)
    for row, mismatched in [*task.train, *task.held_out]:
        assert row.completion_ids[0] == row.prompt_ids[0] == mismatched.prompt_ids[0]
        assert mismatched.completion_ids[0] != row.prompt_ids[0]


def test_completions_are_exchanged_between_different_prompts_though_each_has_several(task_of, tmp_path):
    rows = [{"prompt": f"{a}+", "completion": f"{a}{b}", "label": b > 1} for a in range(8) for b in range(3)]
    task = task_of(dataset=write_rows(tmp_path / "several.jsonl", rows), eval_fraction=0.5)
    for row, mismatched in [*task.train, *task.held_out]:
        assert row.completion_ids[0] == row.prompt_ids[0] == mismatched.prompt_ids[0]
        assert mismatched.completion_ids[0] != row.prompt_ids[0]


def test_a_single_held_out_row_is_refused_with_a_cure(task_of):
    with pytest.raises(ValueError, match=r"2 rows to train on and 2 held out, .* got 35 and 1\. Raise eval_fraction"):
        task_of(eval_fraction=0.01)


def test_apo_zero_unpaired_estimates_no_reference_point(finished, task_of):
    rows = task_of(loss_type="apo_zero_unpaired", eval_fraction=0.01)
    assert rows.prepare is None
    assert len(rows.held_out) == 1  # which could exchange its completion with none
    config = dataclasses.replace(finished[0], loss_type="apo_zero_unpaired")
    model = load_model(config, run_keys(0)[0])
    batch = kto.collate(model.pad_id, rows.train[:6], 12)

    @jax.jit
    def loss_at_the_start(params, batch):
        reference = kto.make_reference(model, config)(params, batch)
        assert reference.mismatched is None
        return kto.make_loss(model, config)(params, batch._replace(reference=reference), jax.random.key(0))

    loss, metrics = loss_at_the_start(model.params, batch)
    good = np.asarray(batch.labels)
    np.testing.assert_allclose(loss, np.where(good, 0.5, 1.0).mean(), rtol=1e-6)
    np.testing.assert_array_equal(jnp.stack([metrics["kl"], metrics["rewards/margins"]]), 0)
