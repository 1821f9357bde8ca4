import json
import sys

import numpy as np
import pytest

from benchmarks import baselines, results
from benchmarks.baselines import Pairs, fit_pairs, right_pairs

GOOD, BAD = ("a joy", "warm and funny", "superb acting"), ("a mess", "dull and loud", "wooden acting")


def invented(count, seed):
    """Pairs and ratings of snippets that differ by a few telling words."""
    rng = np.random.default_rng(seed)
    texts = [[f"{words[rng.integers(3)]} in scene {rng.integers(50)}" for _ in range(count)] for words in (GOOD, BAD)]
    return Pairs(*texts)


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 200), ("eval", 40)):
        pairs = invented(count, seed=count)
        rows = [{"chosen": a, "rejected": b} for a, b in zip(*pairs, strict=True)]
        rated = [
            {"text": text, "score": score} for a, b in zip(*pairs, strict=True) for text, score in ((a, 2), (b, -2))
        ]
        for name, content in (("pairs", rows), ("ratings", rated)):
            (tmp_path / f"{name}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")
    (tmp_path / "train.txt").write_text("To be, or not to be. " * 50, "utf-8")
    (tmp_path / "eval.txt").write_text("Not to be. To be!", "utf-8")
    return tmp_path


@pytest.mark.parametrize("form", baselines.FORMS)
def test_a_bag_of_words_learns_which_words_are_better(form):
    pytest.importorskip("sklearn")
    score = fit_pairs(invented(200, seed=0), form, 10.0)
    held_out = invented(50, seed=1)
    assert right_pairs(score, held_out) == 50
    assert right_pairs(score, Pairs(held_out.worse, held_out.better)) == 0


def test_a_form_that_there_is_not_is_refused():
    pytest.importorskip("sklearn")
    with pytest.raises(ValueError, match=r"form must be one of .*difference.*, got 'margin'"):
        fit_pairs(invented(4, seed=0), "margin", 1.0)


def test_a_tie_counts_as_a_half():
    pairs = Pairs(["aa", "b", "c"], ["a", "bb", "d"])
    assert right_pairs(lambda texts: np.array([len(text) for text in texts]), pairs) == 1.5


def test_cross_validation_never_fits_on_a_text_that_it_scores(monkeypatch):
    fitted = []

    def fit(pairs, form, strength):
        fitted.append({*pairs.better, *pairs.worse})

        def score(texts):
            assert texts
            assert not fitted[-1] & set(texts)
            return np.array([1.0 if "scene" in text else 0.0 for text in texts])

        return score

    monkeypatch.setattr(baselines, "fit_pairs", fit)
    assert baselines.cross_validate(invented(200, seed=2), "sign", 1.0) == 0.5
    assert len(fitted) == baselines.FOLDS


def test_the_sentiment_of_a_text_is_that_of_its_words():
    pytest.importorskip("vaderSentiment")
    assert -1 <= baselines.sentiment("A horrible, boring mess.") < -0.5
    assert 0.5 < baselines.sentiment("A joy from start to end.") <= 1
    assert baselines.sentiment("The film lasts two hours.") == 0


@pytest.mark.parametrize("name", ["vader_pairs", "vader_ratings", "shakespeare"])
def test_a_command_prints_a_table_and_keeps_its_figures(name, folder, tmp_path, monkeypatch, capsys):
    if name != "shakespeare":
        pytest.importorskip("sklearn")
        pytest.importorskip("vaderSentiment")
    written = tmp_path / "results"
    monkeypatch.setattr(baselines, "record", lambda *args, **kwargs: results.record(*args, folder=written, **kwargs))
    monkeypatch.setattr(sys, "argv", ["baselines", name, "--data", str(folder)])
    baselines.main()
    figures = json.loads((written / f"baseline_{name}.json").read_text())["figures"]
    if name == "vader_pairs":
        assert figures["logistic_difference"]["accuracy"] == figures["ridge_on_ratings"]["accuracy"] == 1.0
        assert figures["logistic_sign"]["interval_95"][0] > 0.9
    elif name == "vader_ratings":
        assert figures["ridge"]["pearson_r"] > 0.95
        assert figures["ridge"]["rmse"] < 1.0 < figures["training_mean"]["rmse"] == pytest.approx(2.0)
    else:
        assert len(figures["ngram_bits_per_byte"]) == 8
        assert figures["xz"]["after_training_text"] < figures["xz"]["alone"]
    assert "baseline" in capsys.readouterr().out
