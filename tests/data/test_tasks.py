"""The shipped tasks: sums and WordNet's definitions."""

import importlib.resources

import pytest

from jaxrl_llm.data import (
    as_rows,
    character_tokenizer,
    one_digit_sums,
    prompt_example,
    supervised_example,
    tokenize_sft_rows,
    wordnet_definitions,
)
from jaxrl_llm.data.sums import ALPHABET
from jaxrl_llm.rewards import exact_match


@pytest.mark.parametrize(
    ("num_terms", "operators", "count"), [(3, "+", 1000), (3, "+-", 4000), (2, "-", 100), (1, "+", 10)]
)
def test_every_expression_occurs_once_and_python_agrees_with_its_value(num_terms, operators, count):
    rows = one_digit_sums(num_terms, operators)
    assert len({row["prompt"] for row in rows}) == len(rows) == count
    assert all(eval(row["prompt"][:-1]) == int(row["completion"]) for row in rows)


def test_sums_are_rows_for_sft_for_grpo_and_for_the_reward():
    rows = as_rows(one_digit_sums(operators="+-"), "sums")
    tokens = tokenize_sft_rows([supervised_example(row) for row in rows], character_tokenizer(ALPHABET), max_length=10)
    assert (len(tokens.rows), tokens.num_truncated) == (4000, 0)
    prompt, columns = prompt_example(rows[0])
    assert exact_match([prompt], [columns["completion"]], answer=[columns["answer"]]) == [1.0]


def test_an_unknown_operator_is_an_error():
    for operators in ("*", ""):
        with pytest.raises(ValueError, match='operators must be "\\+", "-" or "\\+-"'):
            one_digit_sums(operators=operators)


def test_definitions_are_short_distinct_and_fit_in_64_tokens(gpt2):
    rows = wordnet_definitions()
    gloss = {row["prompt"]: row["completion"] for row in rows}
    assert len(gloss) == len(rows) == 5000
    assert gloss["Define: happiness\n"].startswith("state of well-being characterized by emotions")
    tokens = tokenize_sft_rows([supervised_example(row) for row in as_rows(rows)], gpt2, max_length=64)
    assert (len(tokens.rows), tokens.num_truncated) == (5000, 0)


def test_the_licence_stands_beside_the_sample():
    folder = importlib.resources.files("jaxrl_llm.data.wordnet")
    licence = (folder / "LICENSE").read_text("utf-8")
    assert "WordNet 3.0 Copyright 2006 by Princeton University." in licence
    assert "appear on ALL copies of the software, database" in licence
    assert len((folder / "definitions.jsonl").read_bytes()) < 600_000
