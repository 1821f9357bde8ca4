import numpy as np
import pytest

from jaxrl_llm.data import preference_example, split_indices, tokenize_preference
from jaxrl_llm.models import from_pretrained
from jaxrl_llm.recipes.text import orpo
from jaxrl_llm.recipes.text.language_model import LanguageModel, load_rows
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
    folder = tmp_path_factory.mktemp("orpo")
    rows = [
        {"prompt": f"{a}+{b}=", "chosen": "7" * (1 + b % 2), "rejected": "3" * (1 + a)}
        for a in range(4)
        for b in range(6)
    ]
    config = orpo.Config(
        **TINY,
        output_dir=str(folder / "whole"),
        dataset=write_rows(folder / "pairs.jsonl", rows),
        eval_fraction=0.25,
        per_device_train_batch_size=4,
        beta=0.5,
        optim="sgd",
        learning_rate=0.3,
        lr_scheduler_type="constant",
        max_steps=12,
        logging_steps=1,
        eval_steps=6,
        save_steps=6,
        num_samples=0,
    )
    return config, orpo.run(config)


def test_a_run_learns_the_chosen_responses_and_leaves_everything_behind(finished):
    config, figures = finished
    before = curve(config.output_dir)[0]
    assert figures["eval_loss"] < 0.8 * before["eval_loss"]
    assert figures["eval_nll_loss"] < before["eval_nll_loss"] - 0.3
    assert figures["eval_log_odds_chosen"] > before["eval_log_odds_chosen"] + 0.3
    assert_complete_folder(config.output_dir, steps=[6, 12])


def test_metrics_have_the_names_of_trl(finished):
    names = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"}
    names |= {"logps/rejected", "logits/chosen", "logits/rejected", "nll_loss", "log_odds_ratio", "log_odds_chosen"}
    last = curve(finished[0].output_dir)[-1]
    assert set(last) >= names | {f"eval_{name}" for name in names} | {"loss", "eval_loss", "grad_norm", "epoch"}


def test_evaluations_are_exact(finished):
    config, figures = finished
    model = LanguageModel(*from_pretrained(figures["model"]))
    rows = load_rows(config.dataset)
    held_out = split_indices(len(rows), held_out=0.25, seed=0)[1]
    pairs = [tokenize_preference(preference_example(rows[i]), model.tokenizer) for i in held_out]
    assert len(pairs) == 6 > config.per_device_train_batch_size

    def log_probs(answers):
        texts = [np.concatenate([pair.prompt_ids, ids]) for pair, ids in zip(pairs, answers, strict=True)]
        return token_log_probs(model, model.params, texts)

    chosen, rejected = log_probs([pair.chosen_ids for pair in pairs]), log_probs([pair.rejected_ids for pair in pairs])
    # Averaged over the response, which stands behind a prompt of 4 tokens; the likelihood is that of the prompt too.
    mean_chosen, mean_rejected = (np.array([row[3:].mean() for row in rows]) for rows in (chosen, rejected))
    odds = mean_chosen - np.log1p(-np.exp(mean_chosen)) - mean_rejected + np.log1p(-np.exp(mean_rejected))
    nll, ratio = -np.concatenate(chosen).mean(), -np.log1p(np.exp(-odds)).mean()
    expected = {
        "loss": nll - config.beta * ratio,
        "nll_loss": nll,
        "log_odds_ratio": ratio,
        "log_odds_chosen": odds.mean(),
        "rewards/margins": config.beta * (mean_chosen - mean_rejected).mean(),
        "rewards/accuracies": (mean_chosen > mean_rejected).mean(),
    }
    for name, value in expected.items():
        assert figures[f"eval_{name}"] == pytest.approx(value, abs=1e-5), name


def test_pairs_survive_micro_batches(finished):
    whole, _ = finished
    in_parts = renamed(whole, "in_parts", gradient_accumulation_steps=2)
    orpo.run(in_parts)
    for line, other in zip(curve(whole.output_dir), curve(in_parts.output_dir), strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=5e-6)
    assert_close_weights(whole.output_dir, in_parts.output_dir, atol=2e-6)
