"""Rewards of form: TRL's table of <think>, and tags in order."""

import pytest

from jaxrl_llm.rewards import tag_format, think_format

VALID = [
    "<think>This is my reasoning.</think>This is my answer.",
    "<think>\nThis is my reasoning.\n</think>\nThis is my answer.",
    "<think>\nThis is\nmy reasoning.\n</think>\nThis is my answer.",
    "<think>\nThis is <some tag> my reasoning.</think>\nThis is my answer.",
    "<think></think>\nThis is my answer.",
]
INVALID = [
    "<think>\nThis is my reasoning.\nThis is my answer.",
    "<think>This is my reasoning.\nThis is my answer.",
    "This is my reasoning. This is my answer.",
    "This is my reasoning.\nThis is my answer.",
    "This is my reasoning.</think>\nThis is my answer.",
    "This is my reasoning.</think>This is my answer.",
    "This<think>is my reasoning.</think>\nThis is my answer.",
    "<think>This is<think>my reasoning.</think></think>This is my answer.",
    "<think>This is</think>\nmy\n<think>reasoning.</think>\nThis is my answer.",
]


def test_reasoning_comes_first_and_once():
    assert think_format(VALID + INVALID) == [1.0] * 5 + [0.0] * 9
    messages = [[{"role": "assistant", "content": text}] for text in VALID + INVALID]
    assert think_format(messages) == [1.0] * 5 + [0.0] * 9
    assert think_format(["", "</think><think>", "<think>a</think></think>b"]) == [0.0] * 3


@pytest.mark.parametrize(
    ("text", "strict", "loose"),
    [
        ("<think>a</think><answer>7</answer>", 1, 1),
        (" <think>a</think>\n\n<answer></answer>\n", 1, 1),
        ("Well, <think>a</think><answer>7</answer>.", 0, 1),
        ("<answer>7</answer><think>a</think>", 0, 0),
        ("<think>a<answer>7</answer></think>", 0, 0),
        ("<think>a</think><answer>7</answer><answer>8</answer>", 0, 0),
        ("<think>a</think><answer>7", 0, 0),
        ("<think>a</think>", 0, 0),
        ("", 0, 0),
    ],
)
def test_tags_open_and_close_once_in_their_order(text, strict, loose):
    assert tag_format()(completions=[text]) == [strict]
    assert tag_format(strict=False)(completions=[text]) == [loose]


def test_tags_are_different_words():
    for tags in ((), ("a", "a"), ("<a>",)):
        with pytest.raises(ValueError, match="tags must be one or more different words, got"):
            tag_format(tags=tags)
