import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrl_llm.data import preference_example, split_indices, tokenize_preference
from jaxrl_llm.data.rows import as_rows
from jaxrl_llm.log_probs import token_statistics
from jaxrl_llm.losses.preference import SMOOTHED, DPOLossType
from jaxrl_llm.models import from_pretrained
from jaxrl_llm.recipes.text import dpo, generate
from jaxrl_llm.recipes.text.language_model import load_model, load_rows
from jaxrl_llm.recipes.text.offline import OfflineState
from jaxrl_llm.recipes.text.pairs import batch_weights, collate_pairs
from jaxrl_llm.training import checkpoints, init_train_state, make_train_step
from tests.recipes.runs import (
    TINY,
    assert_close_weights,
    assert_complete_folder,
    assert_same_run,
    curve,
    press_ctrl_c_after,
    renamed,
    write_rows,
)


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
        optim="sgd",
        learning_rate=0.3,
        lr_scheduler_type="constant",  # so that the length of a run is no part of its program
        max_steps=12,
        logging_steps=1,
        eval_steps=6,
        save_steps=6,
    )
    return config, dpo.run(config)


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
    steps = {"grad_norm", "learning_rate", "epoch", "num_tokens"}
    assert set(last) >= names | {f"eval_{name}" for name in names} | steps


def test_the_tokens_of_both_responses_are_counted_each_with_its_prompt(finished):
    config, _ = finished
    rows = load_rows(config.dataset)
    train = [rows[i].fields for i in split_indices(len(rows), held_out=0.25, seed=0)[0]]
    one_epoch = sum(2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) + 2 for row in train)  # 2 EOS
    lines = {line["step"]: line for line in curve(config.output_dir)}
    assert lines[9]["num_tokens"] == 2 * one_epoch  # 9 batches of 4 are 18 pairs twice


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
    whole, _ = finished
    in_parts = renamed(whole, "in_parts", gradient_accumulation_steps=2)
    dpo.run(in_parts)
    for line, other in zip(curve(whole.output_dir), curve(in_parts.output_dir), strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=2e-6)
    assert_close_weights(whole.output_dir, in_parts.output_dir, atol=1e-6)


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
    with pytest.raises(
        ValueError, match=r"context_length=4 tokens, and 8 are needed: lower max_length, or give .*more"
    ):
        dpo.run(config)


def test_scoring_all_rows_by_the_reference_beforehand_gives_the_same_run(finished):
    whole, figures = finished
    scored = renamed(whole, "scored", precompute_ref_log_probs=True)
    assert dpo.run(scored) == figures | {"model": f"{scored.output_dir}/model"}
    assert_same_run(whole.output_dir, scored.output_dir)


@pytest.mark.slow
def test_the_reference_follows_the_model_in_every_so_many_steps_and_resumes_with_it(finished, monkeypatch):
    synced = {"sync_ref_model": True, "ref_model_mixup_alpha": 0.25, "ref_model_sync_steps": 3}
    config = renamed(finished[0], "synced", **synced, save_steps=1, save_total_limit=99)
    whole_figures = dpo.run(config)
    start = load_model(config, jax.random.split(jax.random.key(config.seed))[0]).params
    like = OfflineState(init_train_state(start, config.optimizer(config.max_steps)), start)
    expected = start
    for step in range(1, 13):
        state = checkpoints.restore(f"{config.output_dir}/checkpoints", like, step=step).state
        if step % 3 == 0:
            expected = jax.tree.map(lambda new, old: 0.25 * new + 0.75 * old, state.train.params, expected)
        for ours, theirs in zip(jax.tree.leaves(state.ref_params), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7, err_msg=f"step {step}")
    # A reference that has followed rewards less than the one of the start.
    assert whole_figures["eval_rewards/margins"] < finished[1]["eval_rewards/margins"] - 0.1

    cut = renamed(finished[0], "synced_cut", **synced)
    with monkeypatch.context() as patch:
        press_ctrl_c_after(patch, step=7)
        dpo.run(cut)
    figures = dpo.run(dataclasses.replace(cut, resume=True))
    assert_same_run(config.output_dir, cut.output_dir)
    assert figures == whole_figures | {"model": figures["model"]}


TYPES = get_args(DPOLossType)


@pytest.fixture
def unigram(finished, monkeypatch):
    """The recipe around a model that compiles in no time: a table of logits, one for each token."""
    config, _ = finished
    model = load_model(config, jax.random.split(jax.random.key(config.seed))[0])

    def score_pairs(model, config, params, batch, key=None):
        def score(half):
            shape = (*half.tokens[:, 1:].shape, len(params))
            return token_statistics(jnp.broadcast_to(params, shape), half.tokens[:, 1:])

        return score(batch.chosen), score(batch.rejected)

    monkeypatch.setattr(dpo, "score_pairs", score_pairs)
    texts = [("12", "3"), ("4", "567"), ("89", "0"), ("7", "77"), ("3", "1248"), ("555", "6"), ("0", "9"), ("21", "43")]
    rows = as_rows({"prompt": "1+1=", "chosen": chosen, "rejected": rejected} for chosen, rejected in texts)
    pairs = [tokenize_preference(preference_example(row), model.tokenizer) for row in rows]
    batch = jax.tree.map(jnp.asarray, collate_pairs(model.pad_id, pairs, 12))
    params, reference = jax.random.normal(jax.random.key(1), (2, 14))
    scored = dpo.make_reference(model, config)(reference, batch)
    return model, params, batch._replace(reference=scored)


def setting(name, **changes):
    smoothing = 0.1 if name in SMOOTHED else 0.0
    return dpo.Config(
        **TINY, dataset="pairs", **{"loss_type": (name,), "label_smoothing": smoothing, "beta": 0.5} | changes
    )


@pytest.mark.slow
def test_every_loss_type_trains_and_all_but_those_that_sort_survive_micro_batches(unigram):
    model, params, batch = unigram
    optimizer = optax.sgd(1.0)

    def step(name, parts):
        config = setting(name, gradient_accumulation_steps=parts)
        dpo.validate(config)
        weights_fn = None if name.startswith("aot") else batch_weights
        step = make_train_step(dpo.make_loss(model, config), optimizer, weights_fn=weights_fn, num_microbatches=parts)
        return step(init_train_state(params, optimizer), batch, jax.random.key(0))

    whole = jax.jit(lambda: {name: step(name, 1) for name in TYPES})()
    for name, (state, metrics) in whole.items():
        assert 0 < metrics["grad_norm"] < np.inf, name
        assert not np.array_equal(state.params, params), name
    assert len({float(metrics["loss"]) for _, metrics in whole.values()}) == len(TYPES) == 15
    in_parts = jax.jit(lambda: {name: step(name, 2) for name in TYPES if not name.startswith("aot")})()
    for name, (state, metrics) in in_parts.items():
        np.testing.assert_allclose(state.params, whole[name][0].params, rtol=1e-5, atol=1e-6, err_msg=name)
        for metric, value in metrics.items():
            np.testing.assert_allclose(value, whole[name][1][metric], rtol=1e-5, atol=1e-6, err_msg=f"{name} {metric}")


def test_options_reach_the_loss(unigram):
    model, params, batch = unigram

    def loss(batch=batch, **settings):
        config = setting("sigmoid", **settings)
        return dpo.make_loss(model, config)(params, batch, jax.random.key(0))[0]

    def summed(params, half, ld_alpha=1.0):
        log_probs = np.asarray(params - jax.nn.logsumexp(params), np.float64)[half.tokens] * half.loss_mask
        beyond = np.cumsum(half.loss_mask, 1) > np.minimum(*lengths)[:, None]
        return (log_probs * np.where(beyond, ld_alpha, 1)).sum(1)

    halves = jax.tree.map(np.asarray, (batch.chosen, batch.rejected))
    lengths = [half.loss_mask.sum(1) for half in halves]
    chosen, rejected = (summed(params, half) for half in halves)
    delta = chosen - rejected - np.subtract(*(np.asarray(x) for x in batch.reference))
    probs = np.asarray(jax.nn.softmax(params), np.float64)
    # WPO: the mean over tokens of log p(y) - log Σ p², of both responses.
    likely = np.exp(sum(x / n - np.log((probs**2).sum()) for x, n in zip((chosen, rejected), lengths, strict=True)))

    def logistic(x, smoothing=0.1):
        return (1 - smoothing) * np.log1p(np.exp(-x)) + smoothing * np.log1p(np.exp(x))

    sft = -chosen.sum() / lengths[0].sum()
    hinge = np.maximum(0, 1 - 0.5 * delta).mean()
    shortened = [summed(params, half, 0.3) for half in halves]
    shortened_delta = np.subtract(*shortened) - np.subtract(*(np.asarray(x) for x in batch.reference))
    expected = {
        "plain": logistic(0.5 * delta).mean(),
        "mpo": 0.8 * logistic(0.5 * delta).mean() + 0.2 * hinge + sft,
        "wpo": (likely * logistic(0.5 * delta)).mean(),
        "ld": logistic(0.5 * shortened_delta).mean(),
        "free": logistic(0.5 * (chosen - rejected)).mean(),
    }
    ours = jax.jit(
        lambda: {
            "plain": loss(),
            "mpo": loss(loss_type=("sigmoid", "hinge", "sft"), loss_weights=(0.8, 0.2, 1.0)),
            "wpo": loss(use_weighting=True),
            "ld": loss(ld_alpha=0.3),
            "free": loss(batch._replace(reference=None), reference_free=True),
        }
    )()
    for name, value in expected.items():
        assert float(ours[name]) == pytest.approx(value, rel=1e-5), name
    assert dpo.make_reference(model, setting("sigmoid", reference_free=True)) is None
