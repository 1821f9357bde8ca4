"""Collation and order: fixed shapes, masks that tell what is real, and batches that are functions of seed and step."""

import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from jaxrl_llm.data import (
    PreferenceTokens,
    Tokens,
    batch_indices,
    collate_preference,
    collate_prompts,
    collate_sft,
    split_indices,
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


@hypothesis.given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32), st.integers(1, 5))
def test_every_row_comes_once_in_every_epoch(num_rows, batch_size, seed, num_epochs):
    num_steps = -(-num_rows * num_epochs // batch_size)
    batches = [batch_indices(num_rows, batch_size, seed=seed, step=step) for step in range(num_steps)]
    assert {batch.shape for batch in batches} == {(batch_size,)}
    stream = np.concatenate(batches)
    for epoch in range(num_epochs):
        assert sorted(stream[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_batches_depend_on_seed_and_step_alone():
    late = batch_indices(100, 8, seed=3, step=1000)
    batch_indices(100, 8, seed=4, step=0)
    assert batch_indices(100, 8, seed=3, step=1000).tolist() == late.tolist()
    code = "from jaxrl_llm.data import batch_indices; print(batch_indices(100, 8, seed=3, step=1000).tolist())"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == str(late.tolist())


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(batch_indices(50, 50, seed=seed, step=step)) for seed in range(3) for step in range(3)}
    assert len(orders) == 9


@hypothesis.given(st.integers(2, 60), st.integers(0, 1000), st.data())
def test_a_split_parts_all_rows(num_rows, seed, data):
    count = data.draw(st.integers(0, num_rows - 1))
    train, held_out = split_indices(num_rows, held_out=count, seed=seed)
    assert len(held_out) == count
    assert sorted([*train, *held_out]) == list(range(num_rows))
    again = split_indices(num_rows, held_out=count, seed=seed)
    assert train.tolist() == again[0].tolist()


def test_a_fraction_is_rounded_to_rows_and_holds_out_at_least_one():
    assert len(split_indices(1000, held_out=0.128, seed=0)[1]) == 128
    assert len(split_indices(10, held_out=0.001, seed=0)[1]) == 1
    assert (
        split_indices(1000, held_out=0.5, seed=0)[1].tolist() != split_indices(1000, held_out=0.5, seed=1)[1].tolist()
    )


@pytest.mark.parametrize("held_out", [10, 11, -1, 1.0, 0.0, 1.5, -0.1])
def test_a_split_that_leaves_nothing_is_an_error(held_out):
    with pytest.raises(ValueError, match="held_out must be a fraction in"):
        split_indices(10, held_out=held_out, seed=0)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((0, 2, 0, 0), "num_rows"), ((2, 0, 0, 0), "batch_size"), ((2, 2, -1, 0), "seed"), ((2, 2, 0, -1), "step")],
)
def test_numbers_out_of_range_are_errors(arguments, name):
    num_rows, batch_size, seed, step = arguments
    with pytest.raises(ValueError, match=f"{name} must be at least"):
        batch_indices(num_rows, batch_size, seed=seed, step=step)


def test_importing_the_data_layer_imports_no_framework():
    code = (
        "import sys, jaxrl_llm.data; print({'jax', 'flax', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
