"""Answers that are marked in a longer completion."""

import pytest

from jaxrl_llm.rewards import answer_match, boxed_answer, hash_answer, tagged_answer
from tests.unchecked import unchecked


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7\n#### 7", "7"),
        ("#### 6\nno:\n#### 7\nthanks", "7"),
        ("####7", "7"),
        ("####", ""),
        ("### 7", None),
        ("", None),
    ],
)
def test_what_follows_the_last_hashes_is_the_answer(text, answer):
    assert hash_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{7}", "7"),
        (r"\boxed{6}, no, \boxed{ 7 }.", "7"),
        (r"\boxed{\frac{1}{\sqrt{2}}} and {more}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{7} then \boxed{8", "7"),
        (r"\boxed{", None),
        ("boxed{7}", None),
        ("\\boxed{a\\", None),
        (r"\boxed{}", ""),
    ],
)
def test_what_is_boxed_last_is_the_answer_braces_and_all(text, answer):
    assert boxed_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>7</answer>", "7"),
        ("<answer>6</answer> or <answer>\n7\n</answer>.", "7"),
        ("<answer>6 <answer>7</answer>", "7"),
        ("<answer>7</answer> <answer>8", "7"),
        ("</answer>7<answer>", None),
        ("<answer>7", None),
        ("<ANSWER>7</ANSWER>", None),
    ],
)
def test_what_is_tagged_last_is_the_answer(text, answer):
    assert tagged_answer(text) == answer
    assert tagged_answer(text.replace("answer", "a.b"), "a.b") == answer


@pytest.mark.parametrize(
    ("mark", "completion", "answer", "reward"),
    [
        ("hash", "so\n#### 28,080", "28080", 1.0),
        ("hash", "#### 28080.0.", 28080, 1.0),
        ("hash", "28080", "28080", 0.0),
        ("hash", "#### 7", "3 + 4 = 7\n#### 7", 1.0),
        ("hash", "#### 8", "3 + 4 = 7\n#### 7", 0.0),
        ("hash", "#### two  words", "two words", 1.0),
        ("hash", "#### 7", None, None),
        ("boxed", r"\boxed{\frac{1}{3}}", r"\frac{1}{3}", 1.0),
        ("boxed", r"\boxed{\frac{1}{2}}", r"\boxed{\frac{1}{3}}", 0.0),
        ("tag", [{"role": "assistant", "content": "<answer>-4</answer>"}], "-4.00", 1.0),
        ("tag", [], "-4", 0.0),
        ("tag", [{"role": "assistant", "content": None}], "-4", 0.0),
    ],
)
def test_the_marked_answer_must_be_the_right_one(mark, completion, answer, reward):
    assert answer_match(mark=mark)(completions=[completion], answer=[answer]) == [reward]


def test_the_tag_and_the_mark_can_be_chosen():
    assert answer_match(mark="tag", tag="result")(["<result>7</result>"], answer=["7"]) == [1.0]
    with unchecked(), pytest.raises(ValueError, match=r"mark must be one of \('hash', 'boxed', 'tag'\), got 'box'"):
        answer_match(mark="box")
