import dataclasses

import jax
import numpy as np
import pytest

from jaxrl_llm.data import preference_example, split_indices, tokenize_preference
from jaxrl_llm.models import from_pretrained
from jaxrl_llm.recipes.text import cpo
from jaxrl_llm.recipes.text.language_model import LanguageModel, load_rows
from jaxrl_llm.recipes.text.pairs import collate_pairs
from tests.recipes.runs import (
    TINY,
    assert_close_weights,
    assert_complete_folder,
    curve,
    renamed,
    token_log_probs,
    write_rows,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Prefers 7 to 3, with responses of several lengths; more held-out pairs than a batch has."""
    folder = tmp_path_factory.mktemp("cpo")
    rows = [
        {"prompt": f"{a}+{b}=", "chosen": "7" * (1 + b % 2), "rejected": "3" * (1 + a)}
        for a in range(4)
        for b in range(6)
    ]
    config = cpo.Config(
        **TINY,
        output_dir=str(folder / "whole"),
        dataset=write_rows(folder / "pairs.jsonl", rows),
        eval_fraction=0.25,
        per_device_train_batch_size=4,
        beta=0.5,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_steps=12,
        logging_steps=1,
        eval_steps=6,
        save_steps=6,
        num_samples=0,
    )
    return config, cpo.run(config)


def test_a_run_learns_the_chosen_responses_and_leaves_everything_behind(finished):
    config, figures = finished
    before = curve(config.output_dir)[0]
    assert figures["eval_loss"] < 0.8 * before["eval_loss"]
    assert figures["eval_nll_loss"] < before["eval_nll_loss"] - 0.3
    assert figures["eval_rewards/margins"] > before["eval_rewards/margins"] + 0.3
    assert_complete_folder(config.output_dir, steps=[6, 12])


def test_metrics_have_the_names_of_trl(finished):
    names = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"}
    names |= {"logps/rejected", "logits/chosen", "logits/rejected", "nll_loss"}
    last = curve(finished[0].output_dir)[-1]
    assert set(last) >= names | {f"eval_{name}" for name in names} | {"loss", "eval_loss", "grad_norm", "epoch"}


@pytest.fixture(scope="module")
def scored(finished):
    """The trained model, held-out pairs, and the log-probabilities of the tokens of their responses."""
    config, figures = finished
    model = LanguageModel(*from_pretrained(figures["model"]))
    rows = load_rows(config.dataset)
    held_out = split_indices(len(rows), held_out=0.25, seed=0)[1]
    pairs = [tokenize_preference(preference_example(rows[i]), model.tokenizer) for i in held_out]
    assert len(pairs) == 6 > config.per_device_train_batch_size

    def log_probs(answers):
        texts = [np.concatenate([pair.prompt_ids, ids]) for pair, ids in zip(pairs, answers, strict=True)]
        return [row[3:] for row in token_log_probs(model, model.params, texts)]  # prompts have 4 tokens

    return (
        model,
        pairs,
        *(log_probs([getattr(pair, f"{name}_ids") for pair in pairs]) for name in ("chosen", "rejected")),
    )


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


def test_evaluations_are_exact(finished, scored):
    config, figures = finished
    chosen, rejected = (np.array([row.sum() for row in rows]) for rows in scored[2:])
    margins, nll = config.beta * (chosen - rejected), -np.concatenate(scored[2]).mean()
    expected = {
        "loss": nll - log_sigmoid(margins).mean(),
        "nll_loss": nll,
        "rewards/margins": margins.mean(),
        "rewards/accuracies": (margins > 0).mean(),
        "logps/rejected": rejected.mean(),
    }
    for name, value in expected.items():
        assert figures[f"eval_{name}"] == pytest.approx(value, abs=1e-5), name


def test_simpo_and_ipo_average_over_tokens_and_hinge_sums(finished, scored):
    model, pairs, *log_probs = scored
    config = dataclasses.replace(finished[0], cpo_alpha=0.0, simpo_gamma=0.3)
    summed = np.subtract(*([row.sum() for row in rows] for rows in log_probs))
    averaged = np.subtract(*([row.mean() for row in rows] for rows in log_probs))
    powers = np.subtract(*([-np.expm1(-0.2 * row.mean()) / 0.2 for row in rows] for rows in log_probs))
    expected = {
        ("hinge", 0.0): np.maximum(0, 1 - 0.5 * summed).mean(),
        ("ipo", 0.0): ((averaged - 1) ** 2).mean(),  # 1 / (2β)
        ("simpo", 0.0): -log_sigmoid(0.5 * averaged - 0.3).mean(),
        ("simpo", 0.2): -log_sigmoid(0.5 * powers - 0.3).mean(),  # AlphaPO
    }
    batch = collate_pairs(model.pad_id, pairs, 12)

    @jax.jit
    def losses(params, batch):
        configs = [dataclasses.replace(config, loss_type=name, alpha=alpha) for name, alpha in expected]
        return [cpo.make_loss(model, config)(params, batch, jax.random.key(0))[0] for config in configs]

    np.testing.assert_allclose(losses(model.params, batch), list(expected.values()), rtol=1e-5)


def test_pairs_survive_micro_batches(finished):
    whole, _ = finished
    in_parts = renamed(whole, "in_parts", gradient_accumulation_steps=2)
    cpo.run(in_parts)
    for line, other in zip(curve(whole.output_dir), curve(in_parts.output_dir), strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=5e-6)
    assert_close_weights(whole.output_dir, in_parts.output_dir, atol=2e-6)
