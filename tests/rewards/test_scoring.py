"""Scoring: weighted sums over the rewards that apply, and errors that name the function."""

import functools
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rewards import evaluate_rewards


def returning(rewards, name="mine"):
    def reward(prompts, completions, **columns):
        return rewards

    reward.__name__ = name
    return reward


def score(*functions, rows=2, columns=None, weights=None):
    return evaluate_rewards(list(functions), ["p"] * rows, ["c"] * rows, columns, reward_weights=weights)


def test_rewards_are_weighted_and_added():
    table = score(returning([1.0, 2.0], "a"), returning([10, -10], "b"), weights=[1.0, 0.5])
    assert table.names == ("a", "b")
    assert table.per_function.tolist() == [[1.0, 10.0], [2.0, -10.0]]
    assert table.total.tolist() == [6.0, -3.0]
    assert score(returning([1.0, 2.0])).total.tolist() == [1.0, 2.0]


def test_none_does_not_apply_and_a_row_without_any_reward_is_nan():
    table = score(returning([1.0, None, None]), returning([None, 2.0, None]), rows=3, weights=[1.0, 3.0])
    np.testing.assert_array_equal(table.total, [1.0, 6.0, np.nan])
    np.testing.assert_array_equal(table.per_function, [[1.0, np.nan], [np.nan, 2.0], [np.nan, np.nan]])


@pytest.mark.parametrize(
    "rewards",
    [
        [1, 0],
        (True, False),
        np.array([1.0, 0.0]),
        jnp.array([1.0, 0.0], jnp.bfloat16),
        [np.float32(1), jnp.float32(0)],
        [Fraction(1), 0],
    ],
    ids=["ints", "bools", "numpy", "jax", "scalars", "fraction"],
)
def test_numbers_of_every_kind_are_taken(rewards):
    table = score(returning(rewards))
    assert table.total.tolist() == [1.0, 0.0]
    assert table.total.dtype == table.per_function.dtype == np.float32


def test_functions_are_given_the_columns_that_they_name():
    def picky(completions, answer):
        return [float(completion == right) for completion, right in zip(completions, answer, strict=True)]

    def greedy(**everything):
        assert sorted(everything) == ["answer", "completions", "hint", "prompts"]
        return [None, None]

    table = score(picky, greedy, columns={"answer": ["c", "d"], "hint": [1, 2]})
    assert table.total.tolist() == [1.0, 0.0]


def test_equal_names_are_told_apart():
    class Judge:
        def __call__(self, completions, scale=1.0):
            return [scale] * len(completions)

    half = functools.partial(returning([0.5, 0.5], "mine"))
    table = score(returning([1.0, 1.0]), half, Judge(), functools.partial(Judge(), scale=2.0))
    assert table.names == ("mine", "mine_2", "Judge", "Judge_2")
    assert table.total.tolist() == [4.5, 4.5]


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ([1.0], r"Reward 'mine' returned 1 rewards for 2 completions"),
        (1.0, r"Reward 'mine' returned a float; expected a list"),
        (None, r"Reward 'mine' returned a NoneType; expected a list"),
        ([1.0, "2"], r"Reward 'mine' returned '2' for row 1"),
        ([1.0, "good"], r"Reward 'mine' returned 'good' for row 1; expected a finite number, or None"),
        ([[1.0], 0.0], r"Reward 'mine' returned '\[1.0\]' for row 0"),
        (np.ones((2, 2)), r"Reward 'mine' returned '\[1.0, 1.0\]' for row 0"),
        ([1.0, 1j], r"Reward 'mine' returned '1j' for row 1; expected a finite number"),
        ([1.0, object], r"Reward 'mine' returned .* for row 1; expected a finite number"),
        (
            [1.0, float("nan")],
            r"Reward 'mine' returned 'nan' for row 1; expected a finite number, or None where",
        ),
        (jnp.array([jnp.inf, 0.0]), r"Reward 'mine' returned 'inf' for row 0"),
    ],
)
def test_what_a_reward_may_not_return_is_named_with_the_function(rewards, message):
    with pytest.raises(ValueError, match=message):
        score(returning(rewards))


def test_lengths_that_do_not_agree_are_errors():
    reward = returning([1.0, 1.0])
    with pytest.raises(ValueError, match=r"one weight for each of the 1 reward functions .* got \[1.0, 2.0\]"):
        score(reward, weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="the 0 reward functions"):
        score()
    with pytest.raises(ValueError, match="'answer' has 1 entries for 2 completions"):
        score(reward, columns={"answer": ["7"]})
    with pytest.raises(ValueError, match="'prompts' has 1 entries for 2 completions"):
        evaluate_rewards([reward], ["p"], ["c", "c"])
    with pytest.raises(ValueError, match="Columns may not be called \\['completions'\\]"):
        score(reward, columns={"completions": ["a", "b"]})


def test_a_missing_column_is_named_with_the_function_that_needs_it():
    def judge(prompts, completions, answer, **columns):
        return [1.0] * len(completions)

    with pytest.raises(ValueError, match=r"Reward 'judge' needs \['answer'\]; there are \['completions', 'prompts'\]"):
        score(judge)
