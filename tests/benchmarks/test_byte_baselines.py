import math

import pytest

from benchmarks.byte_baselines import COMPRESSORS, compressed_bits_per_byte, ngram_bits_per_byte

TRAIN = b"the cat sat on the mat and the rat sat on the cat "


def test_the_costs_of_one_byte_are_those_by_hand():
    # "abab" has 2 a of 4 bytes, 2 kinds; after the last b comes an a once of 1, one kind.
    unigram = (2 + 2 / 256) / (4 + 2)
    bigram = (1 + 1 * unigram) / (1 + 1)
    assert ngram_bits_per_byte(b"abab", b"a", 2) == pytest.approx([-math.log2(unigram), -math.log2(bigram)])


def test_the_probabilities_of_all_bytes_sum_to_one():
    costs = [ngram_bits_per_byte(TRAIN, bytes([byte]), 8) for byte in range(256)]
    for order in range(8):
        assert sum(2.0 ** -cost[order] for cost in costs) == pytest.approx(1.0)


def test_after_bytes_never_seen_the_shorter_context_decides():
    unigram, *longer = ngram_bits_per_byte(b"zzz" + TRAIN + b"\xff", b"z", 4)
    assert longer == pytest.approx([unigram] * 3)


def test_a_longer_context_pays_on_text_that_repeats():
    unigram, _, _, longest = ngram_bits_per_byte(TRAIN * 20, TRAIN, 4)
    assert longest < 1.0 < 3.0 < unigram


@pytest.mark.parametrize(("train", "order"), [(TRAIN, 0), (TRAIN, 9), (b"abc", 4)])
def test_an_order_out_of_range_is_refused(train, order):
    with pytest.raises(ValueError, match=f"order must be in 1 … 8 and at most len.*, got {order}"):
        ngram_bits_per_byte(train, b"a", order)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_a_compressor_counts_all_bits_alone_and_only_the_added_ones_behind_the_training_text(name):
    alone, after = compressed_bits_per_byte(name, TRAIN * 10, TRAIN)
    assert alone == 8 * len(COMPRESSORS[name](TRAIN)) / len(TRAIN)
    assert 0 <= after < alone / 4
