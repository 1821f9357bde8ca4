"""Rewards of length and repetition, with the numbers of TRL's tests, and the guide's example."""

import pytest

from jaxrl_llm.rewards import (
    answer_match,
    cosine_scaled,
    evaluate_rewards,
    guide_example,
    repetition_penalty,
    soft_overlong,
)


def of_lengths(*lengths):
    return [list(range(length)) for length in lengths]


def test_the_punishment_of_length_starts_at_the_cache_and_ends_at_minus_one():
    reward = soft_overlong(max_completion_length=100, cache=20)
    assert reward(completion_ids=of_lengths(0, 50, 80, 90, 100, 110)) == [0, 0, 0, -0.5, -1, -1]
    step = soft_overlong(max_completion_length=100, cache=0)
    assert step(completion_ids=of_lengths(100, 101)) == [0, -1]
    for length, cache in ((100, 101), (100, -1), (0, 0)):
        with pytest.raises(ValueError, match=r"0 <= cache <= max_completion_length is meant, got"):
            soft_overlong(max_completion_length=length, cache=cache)


@pytest.mark.parametrize(
    ("size", "penalty", "ids", "expected"),
    [
        (2, -1.0, [5] * 5, -0.75),
        (1, -1.0, [1, 1, 2, 2, 1], -0.6),
        (1, -1.0, [1, 2, 3, 1, 2], -0.4),
        (2, -1.0, [1, 2, 3, 1, 2], -0.25),
        (2, -0.5, [5] * 5, -0.375),
        (3, -1.0, [1, 2, 3, 4, 5], 0.0),
        (3, -1.0, [7, 7], 0.0),
        (3, -1.0, [], 0.0),
        (1, 0.0, [7, 7], 0.0),
    ],
)
def test_the_penalty_is_the_share_of_repeated_ngrams(size, penalty, ids, expected):
    reward = repetition_penalty(ngram_size=size, max_penalty=penalty)
    assert reward(completion_ids=[ids]) == pytest.approx([expected])


def test_a_penalty_is_no_reward():
    for options in ({"max_penalty": 0.1}, {"max_penalty": float("nan")}, {"ngram_size": 0}):
        with pytest.raises(ValueError, match="ngram_size >= 1 and max_penalty <= 0 are meant"):
            repetition_penalty(**options)


@pytest.mark.parametrize(
    ("right", "length", "expected"),
    [
        (True, 25, 0.92678),
        (True, 75, 0.57322),
        (False, 25, -0.92678),
        (False, 75, -0.57322),
        (True, 50, 0.75),
        (False, 50, -0.75),
        (True, 0, 1.0),
        (True, 100, 0.5),
        (False, 0, -1.0),
        (False, 100, -0.5),
        (True, 200, 0.5),
        (False, 200, -0.5),
    ],
)
def test_right_answers_are_better_short_and_wrong_ones_long(right, length, expected):
    completion = rf"\boxed{{\frac{{1}}{{{3 if right else 2}}}}}"
    for correct in ("answer_match(mark='boxed')", answer_match(mark="boxed")):
        reward = cosine_scaled(max_length=100, correct=correct)
        got = reward([""], [completion], completion_ids=of_lengths(length), answer=[r"\frac{1}{3}"])
        assert got == pytest.approx([expected], abs=1e-5)


def test_what_is_not_applicable_stays_so_and_the_values_can_be_chosen():
    reward = cosine_scaled(max_length=100, min_value_correct=0.0, max_value_correct=2.0)
    given = {"answer": ["7", None], "completion_ids": of_lengths(50, 50), "other": [1, 2]}
    table = evaluate_rewards([reward], ["", ""], ["7", "7"], given)
    assert table.names == ("cosine_scaled",)
    assert table.per_function[0, 0] == pytest.approx(1.0)
    assert table.total[1] != table.total[1]
    with pytest.raises(ValueError, match="max_length >= 1 is meant, got 0"):
        cosine_scaled(max_length=0)
    with pytest.raises(ValueError, match="There is no reward 'exact'"):
        cosine_scaled(max_length=1, correct="exact")


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("a" * 49, 0.0),
        ("a" * 50, 1.0),
        ("a" * 200, 1.0),
        ("a" * 201, 0.0),
        ("好好", 0.5),
        ("优秀，正确，是的，好", 2.0),
        ("好" * 60, 1.5),
        ("", 0.0),
    ],
)
def test_the_example_of_the_guide(text, reward):
    assert guide_example([text]) == guide_example([[{"role": "assistant", "content": text}]]) == [reward]
