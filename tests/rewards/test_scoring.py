"""Scoring: weighted sums over the rewards that apply, and errors that name the function."""

import functools
import threading
import time
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.rewards import RewardError, evaluate_rewards
from tests.unchecked import unchecked


def returning(rewards, name="mine"):
    def reward(prompts, completions, **columns):
        return rewards

    reward.__name__ = name
    return reward


def score(*functions, rows=2, columns=None, weights=None, **options):
    return evaluate_rewards(list(functions), ["p"] * rows, ["c"] * rows, columns, reward_weights=weights, **options)


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


def raising(error):
    """Raises on the completions that say so, on any number of rows."""

    def fragile(prompts, completions):
        if any("bad" in text for text in completions):
            raise error
        return [1.0] * len(completions)

    return fragile


TEXTS = ["good", "bad", "good", "bad " * 100]


@pytest.mark.parametrize("error", [KeyError("x"), TimeoutError("mine"), SystemExit(0)], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("timeout", [None, 60.0])
def test_an_exception_is_told_with_its_row_or_counts_as_none(error, timeout):
    prompts = [f"p{row}" for row in range(4)]
    message = rf"Reward 'fragile' raised {type(error).__name__}: .*\. Row 1: prompt 'p1', completion 'bad'\. Mend"
    with pytest.raises(RewardError, match=message) as caught:
        evaluate_rewards([raising(error)], prompts, TEXTS, timeout=timeout)
    assert caught.value.__cause__ is error
    table = evaluate_rewards([raising(error), returning([2.0] * 4)], prompts, TEXTS, on_error="ignore", timeout=timeout)
    np.testing.assert_array_equal(table.per_function[:, 0], [1.0, np.nan, 1.0, np.nan])
    assert table.total.tolist() == [3.0, 2.0, 3.0, 2.0]
    assert table.errors.tolist() == [2, 0]


def test_long_texts_are_shortened_in_messages():
    with pytest.raises(RewardError, match=r"Row 0: .*completion 'bad bad [bad ]+ … [bad ]+'\.") as caught:
        evaluate_rewards([raising(ValueError("no"))], ["p"], TEXTS[3:])
    assert len(str(caught.value)) < 400


def test_an_exception_on_all_rows_together_gives_no_row_a_reward():
    def together(completions):
        if len(completions) > 1:
            raise RuntimeError("too many")
        return [1.0]

    with pytest.raises(RewardError, match=r"raised RuntimeError: too many on all rows together, though on none alone"):
        score(together)
    table = score(together, on_error="ignore")
    assert np.isnan(table.total).all()
    assert table.errors.tolist() == [2]


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e39, 10**400, np.float32("inf")])
def test_a_value_that_is_not_finite_in_float32_poisons_nothing(value):
    with pytest.raises(RewardError, match=r"'mine' returned '(nan|-?inf|1e\+39)' for row 1; .*Row 1: prompt 'p'"):
        score(returning([1.0, value]))
    table = score(returning([1.0, value]), returning([5.0, 6.0]), on_error="ignore")
    assert table.total.tolist() == [6.0, 6.0]
    assert table.errors.tolist() == [1, 0]


def test_mistakes_of_the_program_are_never_ignored():
    for rewards, message in (([1.0], "1 rewards for 2"), (None, "NoneType"), (["1", 0], "returned '1' for row 0")):
        with pytest.raises(ValueError, match=message):
            score(returning(rewards), on_error="ignore", timeout=60.0)
    with pytest.raises(ValueError, match="needs \\['answer'\\]"):
        score(lambda completions, answer: [0.0, 0.0], on_error="ignore")

    def wrong_alone(completions):
        if len(completions) > 1:
            raise RuntimeError
        return []

    with pytest.raises(ValueError, match="returned 0 rewards for 1 completions"):
        score(wrong_alone, on_error="ignore")


def test_a_function_that_hangs_is_left_behind():
    go_on = threading.Event()

    def hangs(completions):
        go_on.wait()
        return [1.0] * len(completions)

    start = time.monotonic()
    with pytest.raises(
        RewardError, match=r"'hangs' took longer than the timeout of 0.1 s for 2 completions\. The first"
    ):
        score(hangs, timeout=0.1)
    table = score(hangs, returning([1.0, 2.0]), on_error="ignore", timeout=0.1)
    go_on.set()
    assert time.monotonic() - start < 30
    assert table.total.tolist() == [1.0, 2.0]
    assert table.errors.tolist() == [2, 0]


def test_a_function_that_raises_and_then_hangs_is_left_behind():
    go_on = threading.Event()

    def hangs_alone(completions):
        if len(completions) > 1:
            raise RuntimeError("no")
        go_on.wait()

    with pytest.raises(RewardError, match=r"raised RuntimeError: no, and called row by row took longer than the 0.1 s"):
        score(hangs_alone, timeout=0.1)
    assert score(hangs_alone, on_error="ignore", timeout=0.1).errors.tolist() == [2]
    go_on.set()


def test_ctrl_c_is_no_error_of_the_reward():
    def interrupted(completions):
        raise KeyboardInterrupt

    for timeout in (0.0, 60.0):
        with pytest.raises(KeyboardInterrupt):
            score(interrupted, on_error="ignore", timeout=timeout)


def test_a_function_that_changes_its_arguments_changes_nothing_for_the_next():
    def vandal(prompts, completions, answer):
        for values in (prompts, completions, answer):
            values.clear()
        return [0.0, 0.0]

    def counts(prompts, completions, answer):
        return [len(answer), len(prompts)]

    answers = ["1", "2"]
    assert score(vandal, counts, columns={"answer": answers}).total.tolist() == [2.0, 2.0]
    assert answers == ["1", "2"]


def test_what_a_partial_binds_is_no_column():
    def scaled(completions, scale, **columns):
        return [scale] * len(completions)

    bound = functools.partial(scaled, scale=2.0)
    assert score(bound, columns={"scale": [3.0, 3.0]}).total.tolist() == [2.0, 2.0]


def test_options_out_of_range_are_refused():
    for options, message in (
        ({"timeout": -1.0}, "timeout must be a number of seconds, or 0 for no limit, got -1"),
        ({"timeout": float("nan")}, "timeout must be"),
        ({"weights": [float("nan")]}, "all finite; got"),
    ):
        with pytest.raises(ValueError, match=message):
            score(returning([1.0, 1.0]), **options)
    with unchecked(), pytest.raises(ValueError, match=r"on_error must be one of \('raise', 'ignore'\), got 'skip'"):
        score(returning([1.0, 1.0]), on_error="skip")
    with pytest.raises(ValueError, match="exceeds float32"):
        score(returning([1e38, 1.0]), weights=[1e3])
