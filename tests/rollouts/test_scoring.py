"""Scoring against the dense formula and torch's logits; and the promise that it equals what the sampler recorded."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import from_pretrained, head_kernel
from jaxrl_llm.rollouts import generate, score_completions, score_tokens

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDEN = Path(__file__).parents[1] / "golden"
EOS = (2, 3, 5, 8, 13, 21, 34, 55)


@functools.cache
def golden(name="gpt2_untied", **settings):
    """A small random GPT-2 that transformers wrote, prompts of 10, 7 and 3 tokens, and what torch makes of them."""
    module, params, _ = from_pretrained(GOLDEN / name, **settings)
    return module, params, {key: jnp.asarray(array) for key, array in np.load(GOLDEN / name / "golden.npz").items()}


def jit_scoring(score, module, **static):
    def compiled(params, *arrays, **traced):
        return score(module.apply, head_kernel, params, *arrays, **static, **traced)

    return jax.jit(compiled)


@functools.cache
def scorer(score, name="gpt2_untied", **static):
    return jit_scoring(score, golden(name)[0], **static)


@functools.cache
def sampler(module, **static):
    def sample(params, key, ids, mask, temperature):
        return generate(module.apply, params, key, ids, mask, temperature=temperature, **static)

    return jax.jit(sample)


def dense_log_probs(logits, tokens, temperature=1.0):
    """Log-probabilities of `tokens[:, 1:]` by the formula, in float64."""
    scaled = np.asarray(logits, np.float64)[:, :-1] / temperature
    scaled -= scaled.max(-1, keepdims=True)
    log_probs = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    return np.take_along_axis(log_probs, np.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]


def test_the_score_of_left_padded_tokens_is_that_of_torchs_logits():
    _, params, data = golden()
    score = scorer(score_tokens, chunk_size=4)  # 4 does not divide the 9 positions
    real = np.asarray(data["mask"])[:, :-1]
    for temperature in (0.7, 1.0, 2.0):
        found = score(params, data["tokens"], data["mask"], temperature=temperature).log_probs
        expected = dense_log_probs(data["logits"], data["tokens"], temperature)
        assert found.shape == (3, 9)
        np.testing.assert_allclose(np.asarray(found)[real], expected[real], atol=1e-4, rtol=0)


def test_the_side_of_the_padding_and_the_size_of_the_chunks_change_no_score():
    _, params, data = golden()
    expected = scorer(score_tokens, chunk_size=4)(params, data["tokens"], data["mask"], temperature=1.0)
    lengths = (10, 7, 3)
    right = np.zeros((3, 10), np.int32)
    for row, length in enumerate(lengths):
        right[row, :length] = data["tokens"][row, 10 - length :]
    mask = jnp.asarray(np.arange(10) < np.array(lengths)[:, None])
    for dtype, chunk_size in ((bool, 4), (jnp.float32, 128)):
        found = scorer(score_tokens, chunk_size=chunk_size)(params, jnp.asarray(right), mask.astype(dtype))
        for name in expected._fields:
            for row, length in enumerate(lengths):
                theirs = getattr(expected, name)[row, 10 - length :]
                np.testing.assert_allclose(getattr(found, name)[row, : length - 1], theirs, atol=2e-5, rtol=0)


def test_the_score_of_packed_rows_equals_that_of_their_sequences_alone():
    _, params, data = golden()
    sequences = [np.asarray(data["tokens"])[row, -length:] for row, length in enumerate((5, 7, 3))]
    packed = jnp.asarray([np.concatenate([*sequences, [0, 0]])])
    segment_ids = jnp.array([[1] * 5 + [2] * 7 + [3] * 3 + [0] * 2])
    score = scorer(score_tokens)
    found = score(params, packed, segment_ids > 0, segment_ids=segment_ids)
    assert found.log_probs.shape == (1, 16)
    width = max(map(len, sequences))
    alone = jnp.asarray([np.pad(tokens, (0, width - len(tokens))) for tokens in sequences])
    expected = score(params, alone, jnp.asarray([np.arange(width) < len(tokens) for tokens in sequences]))
    for row, (start, tokens) in enumerate(zip((0, 5, 12), sequences, strict=True)):
        inside = slice(start, start + len(tokens) - 1)  # what comes first in a segment is predicted by nothing
        for theirs, ours in zip(expected, found, strict=True):
            np.testing.assert_allclose(ours[0, inside], theirs[row, : len(tokens) - 1], atol=2e-5, rtol=0)


def test_completions_are_scored_by_torchs_logits():
    _, params, data = golden()
    tokens, mask = data["tokens"], data["mask"]
    prompts, completions = (tokens[:, :8], mask[:, :8]), (tokens[:, 8:], mask[:, 8:])
    found = scorer(score_completions, chunk_size=1)(params, *prompts, *completions, temperature=0.7).log_probs
    expected = dense_log_probs(data["logits"], tokens, temperature=0.7)[:, 7:]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)


PADDINGS = {"left": [1, 0], "right": [0, 1], "both": [0.5, 0.5], "between": None}


def padded(side, batch, width=12, seed=0):
    """The same prompts of 1 to `width` - 2 tokens, with the padding on any side."""
    draw = np.random.RandomState(seed)
    ids, mask = draw.randint(0, 47, (batch, width)), np.zeros((batch, width), bool)
    for row in range(batch):
        prompt = np.random.RandomState(row).randint(0, 47, (3 * row) % (width - 2) + 1)
        if side == "between":
            places = np.sort(draw.permutation(width)[: len(prompt)])
        else:
            places = np.arange(len(prompt)) + round(PADDINGS[side][0] * (width - len(prompt)))
        ids[row, places], mask[row, places] = prompt, True
    return jnp.asarray(ids), jnp.asarray(mask)


SHAPES = [(1, 1, 3), (4, 1, 12), (4, 1, 6), (2, 3, 6)]


@pytest.mark.parametrize(("batch", "num_generations", "max_new_tokens"), SHAPES)
def test_scores_equal_what_the_sampler_recorded(batch, num_generations, max_new_tokens):
    module, params, _ = golden()
    sample = sampler(module, max_new_tokens=max_new_tokens, num_generations=num_generations, eos_id=EOS, pad_id=7)
    score = scorer(score_completions)
    worst = 0.0
    for temperature in (0.5, 1.0, 1.7):
        texts = []
        for side in PADDINGS:
            ids, mask = padded(side, batch)
            text = sample(params, jax.random.key(1), ids, mask, temperature)
            rows = (jnp.asarray(np.repeat(array, num_generations, axis=0)) for array in (ids, mask))
            scored = score(params, *rows, text.ids, text.mask, temperature=temperature).log_probs
            worst = max(worst, np.abs(scored - text.log_probs)[np.asarray(text.mask)].max())
            np.testing.assert_array_equal(text.sampling_log_probs, text.log_probs, err_msg="no filter is on")
            texts.append(text)
        for text in texts:
            np.testing.assert_array_equal(text.ids, texts[0].ids, err_msg="padding changes no text")
    print(f"{batch} prompts, {num_generations} each, {max_new_tokens} tokens: largest difference {worst:.1e}")
    assert worst < 1e-4


def test_the_length_of_the_cache_changes_neither_text_nor_log_probs():
    module, params, _ = golden()
    short, long = (
        sampler(module, max_new_tokens=length, num_generations=1, eos_id=EOS, pad_id=7)(
            params, jax.random.key(2), *padded("left", 4), 1.0
        )
        for length in (6, 12)
    )
    np.testing.assert_array_equal(long.ids[:, :6], short.ids)
    np.testing.assert_allclose(long.log_probs[:, :6], short.log_probs, atol=1e-5, rtol=0)
    assert 0 < long.mask[:, 6:].sum() < 4 * 6, "some rows end, and some go on"


def test_a_bfloat16_model_records_log_probs_in_float32():
    module, params, _ = golden(dtype="bfloat16")
    ids, mask = padded("left", 4)
    text = sampler(module, max_new_tokens=6)(params, jax.random.key(0), ids, mask, 1.0)
    arguments = params, ids, mask, text.ids, text.mask
    half = jit_scoring(score_completions, module)(*arguments).log_probs
    full = scorer(score_completions)(*arguments, temperature=1.0).log_probs
    for log_probs in (text.log_probs, text.sampling_log_probs, half):
        assert log_probs.dtype == jnp.float32
        assert (log_probs.astype(jnp.bfloat16).astype(jnp.float32) != log_probs).any(), "not rounded to bfloat16"
        np.testing.assert_allclose(log_probs, full, atol=0.2, rtol=0)
    np.testing.assert_allclose(text.log_probs, half, atol=0.05, rtol=0)


def test_dropout_is_drawn_from_its_key_and_is_off_without_one():
    module, params, data = golden(embd_pdrop=0.5, attn_pdrop=0.0, resid_pdrop=0.0)
    arguments = params, data["tokens"], data["mask"]
    plain = scorer(score_tokens, chunk_size=4)(*arguments, temperature=1.0).log_probs
    dropped = jit_scoring(score_tokens, module)
    first, again, other = (dropped(*arguments, dropout_key=jax.random.key(seed)).log_probs for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    assert not np.allclose(first, plain)


def test_prompts_whose_mask_does_not_fit_are_refused():
    module, params, data = golden()
    arguments = data["tokens"], data["mask"][:, :9], data["tokens"], data["mask"]
    with pytest.raises(ValueError, match=r"prompt_mask must have the shape of prompt_ids, \(3, 10\), got \(3, 9\)"):
        score_completions(module.apply, head_kernel, params, *arguments)
