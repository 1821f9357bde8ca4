import itertools

import numpy as np
import pytest

from jaxrl_llm.recipes.statistics import pass_at_k, pearson_correlation, wilson_interval


def test_the_interval_holds_the_shares_that_a_score_test_does_not_reject():
    for right, total in ((0, 5), (3, 7), (50, 100), (9, 9)):
        low, high = wilson_interval(right, total)
        for end in (low, high):
            if 0 < end < 1:
                z = (right / total - end) / np.sqrt(end * (1 - end) / total)
                assert abs(z) == pytest.approx(1.959964, abs=1e-5)
        assert 0 <= low <= right / total <= high <= 1


def test_a_higher_confidence_gives_a_wider_interval():
    inner, outer = wilson_interval(3, 10), wilson_interval(3, 10, confidence=0.99)
    assert outer[0] < inner[0] < inner[1] < outer[1]


@pytest.mark.parametrize("counts", [(3, 0), (-1, 2), (3, 2)])
def test_an_impossible_count_has_no_interval(counts):
    with pytest.raises(ValueError, match=f"got {counts[0]} of {counts[1]}"):
        wilson_interval(*counts)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_choices_of_k_samples_with_a_right_one(k):
    problems = [[0, 0, 0, 0, 0], [1, 0, 0, 1, 0], [1, 1, 1, 1, 1]]
    shares = [np.mean([any(chosen) for chosen in itertools.combinations(samples, k)]) for samples in problems]
    assert pass_at_k([sum(samples) for samples in problems], num_samples=5, k=k) == pytest.approx(np.mean(shares))


def test_pass_at_k_is_exact_for_thousands_of_samples():
    assert pass_at_k([1], num_samples=10_000, k=5000) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("num_right", "k", "message"), [([1], 5, "k must"), ([5], 1, "num_right"), ([], 1, "num_right")]
)
def test_impossible_numbers_of_samples_are_refused(num_right, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(num_right, num_samples=4, k=k)


def test_the_correlation_is_that_of_numpy_and_that_of_a_constant_is_nan():
    x, y = np.random.default_rng(0).normal(size=(2, 9))
    assert pearson_correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert pearson_correlation(x, 3 * x - 1) == pytest.approx(1)
    assert np.isnan(pearson_correlation(x, np.ones(9)))
