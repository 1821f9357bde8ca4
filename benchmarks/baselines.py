"""What simple methods reach on the data of the acceptance runs, to hold the models against.

    python -m benchmarks.baselines vader_pairs --data data/vader
    python -m benchmarks.baselines vader_ratings --data data/vader
    python -m benchmarks.baselines shakespeare --data data/shakespeare

`python -m benchmarks.real_data all` makes the data; the `peers` extra has scikit-learn and vaderSentiment. Every choice
(of a form, of the strength of regularization) is made by cross-validation on training data; the held-out files are
only scored. Each command writes benchmarks/results/baseline_<name>.json.
"""

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import byte_baselines
from benchmarks.results import record
from jaxrl_llm.recipes.progress import table
from jaxrl_llm.recipes.statistics import wilson_interval

FOLDS = 5
INVERSE_STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)
RIDGE_STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)
FORMS = ("difference", "sign")

Score = Callable[[Sequence[str]], np.ndarray]


class Pairs(NamedTuple):
    """Texts by pairs: `better[i]` was rated higher than `worse[i]`."""

    better: list[str]
    worse: list[str]

    def take(self, mask: np.ndarray) -> "Pairs":
        """The pairs where `mask` is true."""
        return Pairs(*([text for text, keep in zip(texts, mask, strict=True) if keep] for texts in self))


def sentiment(text: str) -> float:
    """The sentiment of a text by VADER's lexicon and rules: its `compound` score, from -1 (negative) to 1 (positive).

    >>> sentiment("A joy from start to end.") > 0.5 > -0.5 > sentiment("A horrible, boring mess.")
    True
    """
    return _analyzer().polarity_scores(text)["compound"]


def fit_pairs(pairs: Pairs, form: str, strength: float) -> Score:
    """Fits a linear score of TF-IDF features of words and pairs of words to pairs, by logistic regression.

    Args:
        pairs: The training pairs; nothing else is used, not for the features either.
        form: "difference": the features' difference says which text is better (Bradley-Terry with a linear reward);
            "sign": the features of one text say whether it was the better one of its pair.
        strength: The inverse strength C of the L2 penalty.

    Raises:
        ValueError: There is no such form.
    """
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression

    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}.")
    features = _features().fit([*pairs.better, *pairs.worse])
    better, worse = features.transform(pairs.better), features.transform(pairs.worse)
    rows = vstack([better - worse, worse - better] if form == "difference" else [better, worse])
    labels = np.repeat([1, 0], len(pairs.better))
    model = LogisticRegression(C=strength, fit_intercept=form == "sign", max_iter=1000).fit(rows, labels)
    return lambda texts: features.transform(texts) @ model.coef_[0]


def right_pairs(score: Score, pairs: Pairs) -> float:
    """The number of pairs in which the better text scores higher; a tie counts as a half."""
    margins = score(pairs.better) - score(pairs.worse)
    return float(np.sum(margins > 0) + np.sum(margins == 0) / 2)


def cross_validate(pairs: Pairs, form: str, strength: float) -> float:
    """The accuracy on training pairs that a model fitted without their texts reaches.

    Texts are put in folds; a fold is scored on pairs with both texts in it, after fitting to those with none in it.
    """
    texts = sorted({*pairs.better, *pairs.worse})
    fold_of = dict(zip(texts, np.random.default_rng(0).permutation(len(texts)) % FOLDS, strict=True))
    better, worse = (np.array([fold_of[text] for text in side]) for side in pairs)
    right = total = 0.0
    for fold in range(FOLDS):
        held_out = pairs.take((better == fold) & (worse == fold))
        score = fit_pairs(pairs.take((better != fold) & (worse != fold)), form, strength)
        right, total = right + right_pairs(score, held_out), total + len(held_out.better)
    return right / total


def fit_ratings(texts: Sequence[str], ratings: Sequence[float]) -> tuple[Score, float]:
    """Ridge regression of ratings on the same features; returns the score and the penalty chosen by cross-validation."""
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline

    search = GridSearchCV(
        make_pipeline(_features(), Ridge(solver="sparse_cg")),
        {"ridge__alpha": RIDGE_STRENGTHS},
        cv=FOLDS,
        scoring="neg_mean_squared_error",
    ).fit(list(texts), np.asarray(ratings))
    return search.predict, search.best_params_["ridge__alpha"]


def vader_pairs(data: Path) -> dict[str, Any]:
    """Held-out pair accuracy of bags of words and of VADER's lexicon."""
    train, held_out = _read_pairs(data, "train"), _read_pairs(data, "eval")
    figures: dict[str, Any] = {"train_pairs": len(train.better), "eval_pairs": len(held_out.better)}
    chosen = {}
    for form in FORMS:
        accuracies = {strength: cross_validate(train, form, strength) for strength in INVERSE_STRENGTHS}
        strength = max(accuracies, key=accuracies.__getitem__)
        chosen[form] = accuracies[strength]
        figures[f"logistic_{form}"] = {"C": strength, "cross_validation": accuracies[strength]}
        figures[f"logistic_{form}"] |= _pair_figures(fit_pairs(train, form, strength), held_out)
    figures["strongest_by_cross_validation"] = f"logistic_{max(chosen, key=chosen.__getitem__)}"
    ratings = _read_jsonl(data / "ratings_train.jsonl")
    score, alpha = fit_ratings([row["text"] for row in ratings], [row["score"] for row in ratings])
    figures["ridge_on_ratings"] = {"alpha": alpha, **_pair_figures(score, held_out)}
    figures["vader_lexicon"] = _pair_figures(_lexicon_scores, held_out)
    names = [name for name, value in figures.items() if isinstance(value, dict)]
    numbers = [(figures[name]["accuracy"], *figures[name]["interval_95"]) for name in names]
    rows = [(name, "{:.3f} ({:.3f} to {:.3f})".format(*triple)) for name, triple in zip(names, numbers, strict=True)]
    table("Held-out VADER pairs", ["baseline", "accuracy (95 % interval)"], rows)
    print(f"Strongest on the training pairs, by cross-validation: {figures['strongest_by_cross_validation']}.")
    return figures


def vader_ratings(data: Path) -> dict[str, Any]:
    """Error and correlation of ridge regression on held-out ratings, and the correlation of VADER's lexicon."""
    train, held_out = _read_jsonl(data / "ratings_train.jsonl"), _read_jsonl(data / "ratings_eval.jsonl")
    score, alpha = fit_ratings([row["text"] for row in train], [row["score"] for row in train])
    texts, ratings = [row["text"] for row in held_out], np.array([row["score"] for row in held_out])
    predictions = score(texts)
    mean = np.full(len(ratings), np.mean([row["score"] for row in train]))
    figures = {
        "train_rows": len(train),
        "eval_rows": len(held_out),
        "ridge": {"alpha": alpha, "pearson_r": _pearson(predictions, ratings), "rmse": _rmse(predictions, ratings)},
        "training_mean": {"rmse": _rmse(mean, ratings)},
        "vader_lexicon": {"pearson_r": _pearson(_lexicon_scores(texts), ratings)},
    }
    rows = [
        (name, *(figures[name].get(key, "") for key in ("pearson_r", "rmse")))
        for name in ("ridge", "training_mean", "vader_lexicon")
    ]
    table("Held-out VADER ratings (-4 to 4)", ["baseline", "Pearson r", "RMSE"], rows)
    return figures


def shakespeare(data: Path) -> dict[str, Any]:
    """Bits per byte of the held-out works."""
    train, held_out = (data / "train.txt").read_bytes(), (data / "eval.txt").read_bytes()
    costs = byte_baselines.ngram_bits_per_byte(train, held_out, byte_baselines.MAX_ORDER)
    figures: dict[str, Any] = {"train_bytes": len(train), "eval_bytes": len(held_out)}
    figures["ngram_bits_per_byte"] = {str(order): cost for order, cost in enumerate(costs, start=1)}
    for name in byte_baselines.COMPRESSORS:
        alone, primed = byte_baselines.compressed_bits_per_byte(name, train, held_out)
        figures[name] = {"alone": alone, "after_training_text": primed}
    rows = [(f"{order}-grams of bytes, Witten-Bell", cost) for order, cost in enumerate(costs, start=1)]
    for name in byte_baselines.COMPRESSORS:
        rows += [(f"{name}, alone", figures[name]["alone"])]
        rows += [(f"{name}, after the training text", figures[name]["after_training_text"])]
    table("Held-out Shakespeare", ["baseline", "bits per byte"], rows)
    return figures


@functools.cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def _features() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)


def _lexicon_scores(texts: Sequence[str]) -> np.ndarray:
    return np.array([sentiment(text) for text in texts])


def _pair_figures(score: Score, pairs: Pairs) -> dict[str, Any]:
    right, total = right_pairs(score, pairs), len(pairs.better)
    return {"accuracy": right / total, "interval_95": wilson_interval(right, total)}


def _pearson(predictions: np.ndarray, ratings: np.ndarray) -> float:
    return float(np.corrcoef(predictions, ratings)[0, 1])


def _rmse(predictions: np.ndarray, ratings: np.ndarray) -> float:
    return float(np.sqrt(np.mean((predictions - ratings) ** 2)))


def _read_pairs(data: Path, split: str) -> Pairs:
    rows = _read_jsonl(data / f"pairs_{split}.jsonl")
    return Pairs([row["chosen"] for row in rows], [row["rejected"] for row in rows])


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


BASELINES = {"vader_pairs": vader_pairs, "vader_ratings": vader_ratings, "shakespeare": shakespeare}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BASELINES)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data set: data/vader, …")
    arguments = parser.parse_args()
    packages = () if arguments.name == "shakespeare" else ("scikit-learn", "vaderSentiment")
    print(record(f"baseline_{arguments.name}", BASELINES[arguments.name](arguments.data), packages=packages))


if __name__ == "__main__":
    main()
