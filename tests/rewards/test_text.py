"""Rewards on text: what counts as the right answer."""

import pytest

from jaxrl_llm.rewards import exact_match, numeric_match


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("12", "12", 1.0),
        (" 12\n", "12", 1.0),
        ("12", 12, 1.0),
        ("012", "12", 0.0),
        ("12.", "12", 0.0),
        ("", "12", 0.0),
        ("幸福", "幸福", 1.0),
        ([{"role": "assistant", "content": "12"}], "12", 1.0),
        ("12", None, None),
    ],
)
def test_exact_match_compares_the_whole_text(completion, answer, reward):
    assert exact_match(["p"], [completion], answer=[answer]) == [reward]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("3 + 4 is 7.", "7", 1.0),
        ("So it is 7, not 8", "7", 0.0),
        ("1,234.50", 1234.5, 1.0),
        ("1, 2, 3", "3", 1.0),
        ("1,2,30", "30", 1.0),
        ("it is -4", "-4", 1.0),
        ("11-4", "4", 1.0),
        ("= 007", "7", 1.0),
        ("0.1", 0.1, 1.0),
        ("seven", "7", 0.0),
        ("28080", "so 2340 × 12 = 28,080\n#### 28080", 1.0),
        ([{"role": "user", "content": "8"}, {"role": "assistant", "content": "7"}], "7", 1.0),
        ("7", None, None),
    ],
)
def test_numeric_match_compares_the_last_numbers(completion, answer, reward):
    assert numeric_match(["p"], [completion], answer=[answer]) == [reward]


def test_an_answer_without_a_number_is_an_error():
    with pytest.raises(ValueError, match="numeric_match needs a number in the column `answer`, got 'seven'"):
        numeric_match(["p"], ["7"], answer=["seven"])
