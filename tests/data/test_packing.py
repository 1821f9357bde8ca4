"""Packing: the cases of TRL, nothing lost or seen across a border, and the loss and gradient of unpacked rows."""

import itertools
import time

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.data import Tokens, collate_packed, collate_sft, pack_rows, text_windows
from jaxrl_llm.losses import cross_entropy_loss
from jaxrl_llm.models import GPT2, GPT2Config, head_kernel
from jaxrl_llm.rollouts.scoring import score_tokens
from tests.unchecked import unchecked

STRATEGIES = ("bfd", "bfd_split", "wrapped")
OVERLONG = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10, 11], [12]]
LENGTHS = st.lists(st.integers(0, 12), min_size=1, max_size=12)


def make(*rows):
    return [Tokens(np.array(row, np.int32), np.arange(len(row)) > 0, truncated=False) for row in rows]


def segments(row):
    """The segments of a packed row, one list of (id, is target) each."""
    pairs = list(zip(row.ids.tolist(), row.loss_mask.tolist(), strict=True))
    return [
        [pair for pair, segment in zip(pairs, row.segment_ids, strict=True) if segment == index]
        for index in range(1, row.segment_ids.max() + 1)
    ]


def zip_arrays(piece):
    ids, loss_mask = zip(*piece, strict=True)
    return np.array(ids, np.int32), np.array(loss_mask)


@pytest.mark.parametrize(
    ("strategy", "length", "rows", "expected"),
    [
        ("wrapped", 3, [[1, 2, 3, 4], [5, 6, 7], [8]], [[1, 2, 3], [4, 5, 6], [7, 8]]),
        ("bfd", 4, [[1, 2, 3], [4, 5, 6, 7], [8]], [[4, 5, 6, 7], [1, 2, 3, 8]]),
        ("bfd_split", 4, OVERLONG, [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7, 5, 12]]),
        ("bfd", 4, OVERLONG, [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7, 12]]),
        ("bfd", 4, [[1, 2], [], [3, 4, 5, 6], []], [[3, 4, 5, 6], [1, 2]]),
    ],
    ids=["wrapped", "best fit", "split", "cut", "empty rows"],
)
def test_rows_are_packed_as_by_trl(strategy, length, rows, expected):
    assert [row.ids.tolist() for row in pack_rows(make(*rows), length, packing_strategy=strategy)] == expected


@pytest.mark.parity
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_random_rows_are_packed_as_trl_packs_them(strategy, tmp_path, monkeypatch):
    import datasets
    import trl

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    lengths = np.random.default_rng(0).integers(0, 40, 300)
    rows = [list(range(1000 * index, 1000 * index + length)) for index, length in enumerate(lengths)]
    theirs = trl.pack_dataset(datasets.Dataset.from_dict({"input_ids": rows}), 32, strategy)["input_ids"]
    ours = [row.ids.tolist() for row in pack_rows(make(*rows), 32, packing_strategy=strategy)]
    # Rows of one length are alike to both, but TRL sorts them in no defined order.
    assert sorted(map(len, ours)) == sorted(map(len, theirs))
    assert sorted(itertools.chain(*ours)) == sorted(itertools.chain(*theirs))
    if strategy == "wrapped":
        assert ours == list(theirs)


def test_segments_are_counted_from_one_and_begin_without_a_target():
    first, second = pack_rows(make([1, 2, 3], [4, 5, 6, 7], [8]), 4)
    assert (first.segment_ids.tolist(), first.loss_mask.tolist()) == ([1, 1, 1, 1], [False, True, True, True])
    assert (second.segment_ids.tolist(), second.loss_mask.tolist()) == ([1, 1, 1, 2], [False, True, True, False])


def test_the_rest_of_a_cut_row_begins_without_a_target():
    for strategy in ("bfd_split", "wrapped"):
        whole, rest = pack_rows(make([1, 2, 3, 4, 5, 6]), 4, packing_strategy=strategy)
        assert whole.loss_mask.tolist() == [False, True, True, True]
        assert (rest.ids.tolist(), rest.loss_mask.tolist()) == ([5, 6], [False, True])


@hypothesis.given(LENGTHS, st.integers(1, 12), st.sampled_from(STRATEGIES))
def test_packing_keeps_every_token_and_its_order(lengths, length, strategy):
    starts = np.cumsum([0, *lengths])
    rows = make(*(range(start, start + count) for start, count in zip(starts, lengths, strict=False)))
    packed = pack_rows(rows, length, packing_strategy=strategy)
    assert all(0 < len(row.ids) <= length for row in packed)
    pieces = [[token for token, _ in piece] for row in packed for piece in segments(row)]
    kept = [row.ids[:length] if strategy == "bfd" else row.ids for row in rows]
    assert sorted(itertools.chain(*pieces)) == np.concatenate(kept).tolist()
    owner = np.repeat(np.arange(len(lengths)), lengths)
    for piece in pieces:
        assert piece == list(range(piece[0], piece[-1] + 1))
        assert len(set(owner[piece])) == 1
    if strategy == "wrapped":
        assert all(len(row.ids) == length for row in packed[:-1])


@hypothesis.given(st.lists(st.integers(1, 12), min_size=1, max_size=30))
def test_the_best_fit_needs_few_rows(lengths):
    packed = pack_rows(make(*(range(length) for length in lengths)), 12)
    lower_bound = -(-sum(lengths) // 12)
    assert lower_bound <= len(packed) <= lower_bound * 11 / 9 + 1  # the bound for best fit decreasing


def test_masked_prompts_stay_masked():
    rows = [Tokens(np.arange(3, dtype=np.int32), np.array([False, False, True]), truncated=False)] * 2
    (packed,) = pack_rows(rows, 8)
    assert packed.loss_mask.tolist() == [False, False, True] * 2
    assert rows[0].loss_mask.tolist() == [False, False, True]


def test_a_hundred_thousand_rows_are_packed_in_seconds():
    lengths = np.random.default_rng(0).integers(1, 500, 100_000)
    ids, mask = np.zeros(500, np.int32), np.arange(500) > 0
    rows = [Tokens(ids[:length], mask[:length], truncated=False) for length in lengths]
    start = time.process_time()
    packed = pack_rows(rows, 512)
    assert time.process_time() - start < 20  # one second; comparing all pairs would take hours
    assert sum(len(row.ids) for row in packed) == lengths.sum() > 0.99 * 512 * len(packed)


def test_packed_rows_are_padded_and_their_positions_restart():
    batch = collate_packed(pack_rows(make([1, 2, 3], [4, 5, 6, 7, 8, 9], [10, 11]), 6), pad_id=0, length=8)
    assert batch.tokens.tolist() == [[4, 5, 6, 7, 8, 9, 0, 0], [1, 2, 3, 10, 11, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[1] * 6 + [0] * 2, [1] * 3 + [2] * 2 + [0] * 3]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 0], [0, 1, 2, 0, 1, 0, 0, 0]]
    assert batch.mask.tolist() == (batch.segment_ids > 0).tolist()
    assert batch.loss_mask.astype(int).tolist() == [[0, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 0, 0, 0]]
    assert {array.dtype for array in batch} == {np.dtype(np.int32), np.dtype(bool)}
    assert collate_packed(pack_rows(make([1, 2, 3]), 6), pad_id=0, multiple_of=4).tokens.shape == (1, 4)


@pytest.fixture(scope="module")
def objective():
    """The loss and gradient of a tiny GPT-2, of batches that are filled up to 8 rows so that few programs compile."""
    module = GPT2(GPT2Config(vocab_size=19, n_positions=16, n_embd=8, n_layer=2, n_head=2))
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(params, tokens, mask, loss_mask, segment_ids=None):
        scores = score_tokens(module.apply, head_kernel, params, tokens, mask, segment_ids=segment_ids, chunk_size=11)
        return cross_entropy_loss(scores.log_probs, loss_mask[:, 1:])[0]

    return lambda *batch: loss_and_gradient(params, *(np.pad(part, ((0, 8 - len(part)), (0, 0))) for part in batch))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_loss_and_gradient_of_packed_rows_are_those_of_unpacked_rows(objective, strategy):
    generator = np.random.default_rng(0)
    rows = [
        Tokens(generator.integers(0, 19, length, np.int32), np.arange(length) >= prompt, truncated=False)
        for length, prompt in ((5, 2), (7, 1), (3, 1), (4, 3), (12, 6), (5, 1))
    ]
    packed_rows = pack_rows(rows, 12, packing_strategy=strategy)
    if strategy == "wrapped":  # a row that lies across a border is cut: compare with it cut
        rows = [Tokens(*zip_arrays(piece), False) for row in packed_rows for piece in segments(row)]
    packed, unpacked = collate_packed(packed_rows, pad_id=3, length=12), collate_sft(rows, pad_id=3, length=12)
    assert len(packed.tokens) == 3 < len(unpacked.tokens)

    loss, gradient = objective(*unpacked)
    packed_loss, packed_gradient = objective(*packed[:4])
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-6)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6), packed_gradient, gradient)
    mixed, _ = objective(*packed[:3], packed.mask.astype(np.int32))
    assert abs(float(mixed - loss)) > 1e-4  # in one segment they would see one another


@hypothesis.given(st.integers(2, 40), st.integers(1, 12))
def test_every_token_of_a_text_but_the_first_is_a_target_once(num_tokens, length):
    windows = text_windows(list(range(num_tokens)), length)
    assert [window.ids[window.loss_mask].tolist() for window in windows] == [
        list(range(start + 1, min(start + length, num_tokens - 1) + 1)) for start in range(0, num_tokens - 1, length)
    ]
    assert all(len(window.ids) == length + 1 for window in windows[:-1])
    assert not any(window.loss_mask[0] for window in windows)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_rows(make([1]), 0), "length must be at least 1 token, got 0"),
        (lambda: text_windows([1, 2], 0), "length must be at least 1 token, got 0"),
        (lambda: text_windows([1], 4), "at least 2 tokens, one to predict from another, got 1"),
        (lambda: collate_packed(pack_rows(make([1, 2, 3]), 4), pad_id=0, length=2), "got length=2 and 3 tokens"),
    ],
)
def test_what_cannot_be_packed_says_why(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_unknown_strategy_is_refused():
    with unchecked(), pytest.raises(ValueError, match=r"packing_strategy must be one of .*'bfd'.*, got 'ffd'"):
        pack_rows(make([1]), 4, packing_strategy="ffd")
