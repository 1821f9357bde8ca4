"""Collation: fixed shapes, and masks that tell what is real."""

import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxrl_llm.data import (
    PreferenceTokens,
    RatedTokens,
    Tokens,
    UnpairedTokens,
    collate_preference,
    collate_prompts,
    collate_rated,
    collate_sft,
    collate_unpaired,
    count_rows_without_targets,
    rotate_completions,
)

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def ids(*values):
    return np.array(values, np.int32)


def row(length, prompt_length=1):
    return Tokens(np.arange(1, length + 1, dtype=np.int32), np.arange(length) >= prompt_length, truncated=False)


def test_rows_are_padded_on_the_right():
    batch = collate_sft([row(3), row(5, prompt_length=4)], pad_id=9, multiple_of=4)
    assert batch.tokens.tolist() == [[1, 2, 3, 9, 9, 9, 9, 9], [1, 2, 3, 4, 5, 9, 9, 9]]
    assert batch.mask.astype(int).tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert batch.loss_mask.astype(int).tolist() == [[0, 1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0]]
    assert (batch.tokens.dtype, batch.mask.dtype, batch.loss_mask.dtype) == (np.int32, bool, bool)


@hypothesis.given(LENGTHS, st.integers(1, 8))
def test_masks_give_the_rows_back_whatever_the_padding(lengths, multiple_of):
    rows = [row(length) for length in lengths]
    batch = collate_sft(rows, pad_id=1, multiple_of=multiple_of)
    assert batch.tokens.shape[1] % multiple_of == 0
    assert batch.tokens.shape[1] - max(lengths) < multiple_of
    for index, original in enumerate(rows):
        real = batch.mask[index]
        assert batch.tokens[index][real].tolist() == original.ids.tolist()
        assert batch.loss_mask[index][real].tolist() == original.loss_mask.tolist()
        assert not batch.loss_mask[index][~real].any()


def test_prompts_are_padded_on_the_left():
    batch = collate_prompts([ids(5, 6, 7), ids(8)], pad_id=0, length=4)
    assert batch.prompt_ids.tolist() == [[0, 5, 6, 7], [0, 0, 0, 8]]
    assert batch.prompt_mask.tolist() == [[False, True, True, True], [False, False, False, True]]


@pytest.mark.parametrize(
    ("rows", "multiple_of", "left", "right"),
    [
        ([[1, 2, 3], [4, 5]], 1, [[1, 2, 3], [0, 4, 5]], [[1, 2, 3], [4, 5, 0]]),
        ([[1], [2, 3], [4, 5, 6]], 1, [[0, 0, 1], [0, 2, 3], [4, 5, 6]], [[1, 0, 0], [2, 3, 0], [4, 5, 6]]),
        ([[1, 2, 3], [4, 5]], 4, [[0, 1, 2, 3], [0, 0, 4, 5]], [[1, 2, 3, 0], [4, 5, 0, 0]]),
        ([[1, 2, 3, 4], [5]], 4, [[1, 2, 3, 4], [0, 0, 0, 5]], [[1, 2, 3, 4], [5, 0, 0, 0]]),
        ([[1, 2, 3, 4, 5]], 4, [[0, 0, 0, 1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5, 0, 0, 0]]),
        ([[], [7]], 2, [[0, 0], [0, 7]], [[0, 0], [7, 0]]),
    ],
)
def test_padding_on_either_side_is_that_of_trl(rows, multiple_of, left, right):
    prompts = collate_prompts([ids(*values) for values in rows], pad_id=0, multiple_of=multiple_of)
    tokens = [Tokens(ids(*values), np.ones(len(values), bool), truncated=False) for values in rows]
    batch = collate_sft(tokens, pad_id=0, multiple_of=multiple_of)
    assert prompts.prompt_ids.tolist() == left
    assert prompts.prompt_mask.tolist() == [[value != 0 for value in row] for row in left]
    assert batch.tokens.tolist() == right
    assert batch.mask.tolist() == batch.loss_mask.tolist() == [[value != 0 for value in row] for row in right]


def test_the_loss_mask_says_what_trl_says_by_labels_of_minus_100():
    tokens = [
        Tokens(ids(1, 2, 3), np.array([False, True, True]), False),
        Tokens(ids(4, 5), np.array([False, True]), False),
    ]
    batch = collate_sft(tokens, pad_id=0, length=3)
    labels = np.where(batch.loss_mask, batch.tokens, -100)
    assert labels.tolist() == [[-100, 2, 3], [-100, 5, -100]]


def test_pairs_are_laid_out_as_by_trl():
    rows = [
        PreferenceTokens(ids(1, 2, 3), ids(4, 5), ids(6), truncated=False),
        PreferenceTokens(ids(7, 8), ids(9, 10), ids(11, 12, 13), truncated=False),
    ]
    chosen, rejected = collate_preference(rows, pad_id=0, multiple_of=1)
    assert np.concatenate([chosen.tokens, rejected.tokens]).tolist() == [
        [1, 2, 3, 4, 5],
        [7, 8, 9, 10, 0],
        [1, 2, 3, 6, 0],
        [7, 8, 11, 12, 13],
    ]
    assert np.concatenate([chosen.mask, rejected.mask]).astype(int).tolist() == [
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]
    assert np.concatenate([chosen.loss_mask, rejected.loss_mask]).astype(int).tolist() == [
        [0, 0, 0, 1, 1],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 1, 1, 1],
    ]


def test_unpaired_answers_keep_their_labels():
    rows = [UnpairedTokens(ids(1, 2), ids(3, 9), True, False), UnpairedTokens(ids(4), ids(9), False, False)]
    batch = collate_unpaired(rows, pad_id=0, length=4)
    assert batch.completions.tokens.tolist() == [[1, 2, 3, 9], [4, 9, 0, 0]]
    assert batch.completions.loss_mask.astype(int).tolist() == [[0, 0, 1, 1], [0, 1, 0, 0]]
    assert (batch.labels.tolist(), batch.labels.dtype) == ([True, False], bool)


def test_rotation_gives_each_prompt_the_completion_before_it_as_trl_does():
    rows = [UnpairedTokens(ids(n, n), ids(*range(n, 2 * n)), n % 2 == 0, False) for n in (1, 2, 3)]
    rotated = rotate_completions(rows)
    assert [row.prompt_ids.tolist() for row in rotated] == [[1, 1], [2, 2], [3, 3]]
    assert [row.completion_ids.tolist() for row in rotated] == [[3, 4, 5], [1], [2, 3]]
    assert [row.label for row in rotated] == [row.label for row in rows]
    cut = rotate_completions(rows, max_length=4)
    assert [row.completion_ids.tolist() for row in cut] == [[3, 4], [1], [2, 3]]
    assert [row.truncated for row in cut] == [True, False, False]
    assert [len(row.completion_ids) for row in rotate_completions(rows, max_length=2)] == [0, 0, 0]
    with pytest.raises(ValueError, match="a batch of at least 2 rows to exchange completions, got 1"):
        rotate_completions(rows[:1])


def test_rated_texts_keep_their_scores_and_a_text_alone_counts_from_its_second_token():
    rows = [RatedTokens(ids(), ids(3, 4, 9), -1.5, False), RatedTokens(ids(1), ids(2, 9), 3.25, False)]
    batch = collate_rated(rows, pad_id=0, length=4)
    assert batch.texts.tokens.tolist() == [[3, 4, 9, 0], [1, 2, 9, 0]]
    assert batch.texts.loss_mask.astype(int).tolist() == [[0, 1, 1, 0], [0, 1, 1, 0]]
    assert (batch.scores.tolist(), batch.scores.dtype) == ([-1.5, 3.25], np.float32)


def test_rows_without_a_target_are_counted_and_may_be_empty():
    rows = [row(3), row(3, prompt_length=3), Tokens(ids(), np.zeros(0, bool), truncated=True)]
    batch = collate_sft(rows, pad_id=0, multiple_of=4)
    assert count_rows_without_targets(batch.loss_mask) == 2
    assert not batch.mask[2].any()
    assert collate_sft(rows[2:], pad_id=0, multiple_of=4).tokens.shape == (1, 4)


def test_both_halves_of_a_pair_have_one_shape_and_only_answers_count():
    rows = [
        PreferenceTokens(ids(1, 2), ids(3, 9), ids(4, 5, 6, 9), truncated=False),
        PreferenceTokens(ids(1), ids(7, 9), ids(9), truncated=False),
    ]
    chosen, rejected = collate_preference(rows, pad_id=0, multiple_of=2)
    assert chosen.tokens.tolist() == [[1, 2, 3, 9, 0, 0], [1, 7, 9, 0, 0, 0]]
    assert rejected.tokens.tolist() == [[1, 2, 4, 5, 6, 9], [1, 9, 0, 0, 0, 0]]
    assert chosen.loss_mask.astype(int).tolist() == [[0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]]
    assert rejected.loss_mask.astype(int).tolist() == [[0, 0, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0]]


def test_a_row_longer_than_the_fixed_length_is_an_error():
    for collate in (
        lambda: collate_sft([row(5)], pad_id=0, length=4),
        lambda: collate_prompts([ids(1, 2, 3, 4, 5)], pad_id=0, length=4),
        lambda: collate_preference([PreferenceTokens(ids(1, 2), ids(3), ids(4, 5, 6), False)], pad_id=0, length=4),
    ):
        with pytest.raises(ValueError, match="length must be at least that of the longest row, got length=4 and 5"):
            collate()


def test_importing_the_data_layer_imports_no_framework():
    code = (
        "import sys, jaxrl_llm.data; print({'jax', 'flax', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
