"""Batching: every row once an epoch, batches that are functions of seed and step alone, and few lengths to compile."""

import json
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data import Tokens, batch_indices, bucket_length, collate_sft, split_indices


def zipf_lengths(num_rows):
    """Most rows short, a few very long."""
    return np.minimum(np.random.default_rng(0).zipf(1.3, num_rows), 512)


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


@hypothesis.given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.data())
def test_with_lengths_every_row_still_comes_once_in_every_epoch(num_rows, batch_size, num_epochs, data):
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=num_rows, max_size=num_rows))
    num_steps = -(-num_rows * num_epochs // batch_size)
    batches = [batch_indices(num_rows, batch_size, seed=7, step=step, lengths=lengths) for step in range(num_steps)]
    assert {batch.shape for batch in batches} == {(batch_size,)}
    stream = np.concatenate(batches)
    for epoch in range(num_epochs):
        assert sorted(stream[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_rows_of_like_length_share_a_batch_in_every_epoch():
    lengths = zipf_lengths(1003)  # no multiple of the batch: one batch an epoch lies across its end

    def padding(step, **options):
        sizes = lengths[batch_indices(1003, 8, seed=0, step=step, **options)]
        return len(sizes) * sizes.max() - sizes.sum()

    steps = range(3 * 1003 // 8)
    by_length = sum(padding(step, lengths=lengths) for step in steps)
    assert by_length < 0.2 * sum(padding(step) for step in steps)


def test_batches_of_like_length_come_in_a_random_order_and_differ_between_epochs_and_seeds():
    lengths = np.arange(400)
    batches = [batch_indices(400, 4, seed=0, step=step, lengths=lengths) for step in range(200)]
    means = np.array([lengths[batch].mean() for batch in batches[:100]])
    assert abs(np.corrcoef(means, np.arange(100))[0, 1]) < 0.3
    epochs = [{tuple(sorted(batch)) for batch in part} for part in (batches[:100], batches[100:])]
    assert epochs[0] != {tuple(range(start, start + 4)) for start in range(0, 400, 4)} != epochs[1] != epochs[0]
    assert batches[0].tolist() != batch_indices(400, 4, seed=1, step=0, lengths=lengths).tolist()


def test_shuffling_by_length_resumes_exactly_in_another_process():
    steps = [0, 5, 37, 38, 1000]
    code = (
        "import json, sys; from jaxrl_llm.data import batch_indices; lengths = json.loads(sys.argv[1]);"
        "print([batch_indices(101, 8, seed=3, step=s, lengths=lengths).tolist() for s in json.loads(sys.argv[2])])"
    )
    lengths = zipf_lengths(101).tolist()
    arguments = [sys.executable, "-c", code, json.dumps(lengths), json.dumps(steps)]
    fresh = subprocess.run(arguments, capture_output=True, text=True, check=True)
    here = [batch_indices(101, 8, seed=3, step=step, lengths=np.array(lengths)).tolist() for step in reversed(steps)]
    assert fresh.stdout.strip() == str(here[::-1])


def test_an_epoch_of_very_unequal_lengths_compiles_four_programs():
    lengths = zipf_lengths(600)
    rows = [Tokens(np.ones(length, np.int32), np.arange(length) > 0, truncated=False) for length in lengths]
    traced = []

    @jax.jit
    def count(loss_mask):
        traced.append(loss_mask.shape)
        return jnp.sum(loss_mask)

    targets = 0
    for step in range(600 // 8):
        batch = [rows[index] for index in batch_indices(600, 8, seed=0, step=step, lengths=lengths)]
        length = bucket_length(max(len(row.ids) for row in batch), max_length=512)
        targets += int(count(collate_sft(batch, pad_id=0, length=length).loss_mask))
    assert targets == sum(lengths - 1)
    assert sorted(traced) == [(8, 64), (8, 128), (8, 256), (8, 512)]


@hypothesis.given(st.integers(1, 5000), st.integers(1, 100))
def test_a_bucket_is_the_least_power_of_two_times_the_multiple_that_holds_the_longest(longest, multiple_of):
    bucket = bucket_length(longest, multiple_of=multiple_of)
    factor, rest = divmod(bucket, multiple_of)
    assert (rest, factor & (factor - 1)) == (0, 0)
    assert longest <= bucket < max(2 * longest, multiple_of + 1)
    assert bucket_length(longest, multiple_of=multiple_of, max_length=longest) == longest


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bucket_length(65, max_length=64), "longest must be at most max_length=64, got 65. Truncate the rows"),
        (lambda: bucket_length(0), "longest must be at least 1, got 0"),
        (lambda: bucket_length(5, multiple_of=0), "multiple_of must be at least 1, got 0"),
        (
            lambda: batch_indices(3, 2, seed=0, step=0, lengths=[1, 2]),
            "lengths must have one entry for each of the 3 rows, got 2",
        ),
    ],
)
def test_lengths_out_of_range_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
