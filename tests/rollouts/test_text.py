"""The sampler: on GPT-2 against torch and against itself, and on a table of next tokens, where all is known exactly."""

import functools
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxrl_llm.models import from_pretrained
from jaxrl_llm.rollouts import Completions, generate
from jaxrl_llm.types import KVCache

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDEN = Path(__file__).parents[1] / "golden"
EOS_GOLDEN = (2, 3, 5, 8, 13, 21, 34, 55)
"""Tokens that torch's greedy continuations do not have, and that sampled ones often do."""
VOCAB, EOS, PAD = 8, 7, -1

# --- models, and their compiled samplers ------------------------------------------------------------------------------


@functools.cache
def golden(name="gpt2_tied"):
    """A small random GPT-2 that transformers wrote, prompts of 10, 7 and 3 tokens, and what torch makes of them."""
    module, params, _ = from_pretrained(GOLDEN / name)
    return module, params, {key: jnp.asarray(array) for key, array in np.load(GOLDEN / name / "golden.npz").items()}


def table_apply(variables, tokens, *, mask, cache, output="logits"):
    """A model whose logits are the row of the last token in a table; its cache only counts what was written."""
    del mask
    if isinstance(cache, int):
        empty = jnp.zeros((1, len(tokens), cache, 1, 1))
        cache = KVCache(keys=empty, values=empty, mask=jnp.zeros((len(tokens), cache), bool), length=jnp.int32(0))
    outputs = tokens[..., None].astype(jnp.float32) if output == "hidden" else variables["params"][tokens]
    return outputs, cache._replace(length=cache.length + tokens.shape[1])


@functools.cache
def sampler(apply, **static):
    """Compiles `generate`; what a call gives by name may be traced: temperature, top_p, min_p, repetition_penalty."""

    def sample(params, key, ids, mask, **traced):
        return generate(apply, params, key, ids, mask, **static, **traced)

    return jax.jit(sample)


def sample_golden(seed, ids, mask, *, temperature=1.0, scale=1.0, **static):
    module, params, _ = golden()
    static = {"max_new_tokens": 8, "eos_id": EOS_GOLDEN} | static
    arguments = scaled(params, scale), jax.random.key(seed), ids, mask
    return sampler(module.apply, **static)(*arguments, temperature=temperature)


def scaled(params, scale):
    return jax.tree.map(lambda leaf: jnp.asarray(np.float32(scale) * leaf), params)


def sample_table(table, prompts, *, seed=0, max_new_tokens=6, eos_id=EOS, pad_id=PAD, apply=table_apply, **options):
    """Samples after prompts that are given as lists of any length."""
    width = max(map(len, prompts))
    ids = jnp.array([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    static = {"max_new_tokens": max_new_tokens, "eos_id": eos_id, "pad_id": pad_id}
    static |= {name: options.pop(name) for name in ("num_generations", "top_k") if name in options}
    return sampler(apply, **static)(table, jax.random.key(seed), ids, ids != PAD, **options)


def random_table(seed=0):
    return jnp.asarray(np.random.RandomState(seed).normal(0, 1.5, (VOCAB, VOCAB)), jnp.float32)


def chain(*successors):
    """A table in which each token is followed by one other, all but surely."""
    return jnp.asarray(100 * np.eye(VOCAB, dtype=np.float32)[list(successors)])


COUNT_UP = chain(1, 2, 3, 4, 5, 6, 7, 0)

# --- greedy -----------------------------------------------------------------------------------------------------------


def test_greedy_decoding_of_left_padded_prompts_equals_that_of_transformers():
    module, params, data = golden("gpt2_untied")
    arguments = params, jax.random.key(0), data["tokens"], data["mask"]
    greedy = sampler(module.apply, max_new_tokens=8, temperature=0)(*arguments)
    np.testing.assert_array_equal(greedy.ids, data["greedy"])
    assert greedy.mask.all()
    np.testing.assert_array_equal(greedy.sampling_log_probs, 0)


def test_greedy_decoding_equals_that_of_transformers_when_temperature_is_traced():
    data = golden()[2]
    greedy = sample_golden(0, data["tokens"], data["mask"], temperature=0.0)
    np.testing.assert_array_equal(greedy.ids, data["greedy"])
    np.testing.assert_array_equal(greedy.sampling_log_probs, 0)
    # the first token's log-probability is that of the unscaled distribution
    expected = jax.nn.log_softmax(data["logits"][:, -1]).max(-1)
    np.testing.assert_allclose(greedy.log_probs[:, 0], expected, atol=1e-4, rtol=0)


def test_greedy_decoding_heeds_the_repetition_penalty():
    table = jnp.full((VOCAB, VOCAB), -50.0).at[:, 1:4].set(jnp.array([[9.0, 6.0, 5.0]]))
    # token 1 halves to 4.5, then token 2 to 3, then token 3 to 2.5: from then on 4.5 is the largest again
    completions = sample_table(table, [[0]], temperature=0.0, repetition_penalty=2.0)
    assert completions.ids.tolist() == [[1, 2, 3, 1, 1, 1]]
    assert sample_table(table, [[1]], temperature=0.0, repetition_penalty=2.0).ids[0, 0] == 2, "the prompt counts"
    assert sample_table(table, [[0]], temperature=0.0, repetition_penalty=1.0).ids.tolist() == [[1] * 6]


# --- the distribution that is sampled ---------------------------------------------------------------------------------


def exact_probs(logits, history, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """The distribution over next tokens, in float64 and in plain loops."""
    logits = [float(x) for x in logits]
    for token in set(history):
        logits[token] *= repetition_penalty if logits[token] < 0 else 1 / repetition_penalty
    weights = np.exp(np.array(logits) / temperature)
    order = np.argsort(-weights)
    if top_k:
        weights[order[top_k:]] = 0
    probs, mass, kept = weights / weights.sum(), 0.0, np.zeros(len(logits))
    for token in order:
        if mass < top_p and probs[token] >= min_p * probs.max():
            kept[token] = probs[token]
        mass += probs[token]
    return kept / kept.sum()


def chi_square(counts, probs):
    """Pearson's statistic and its degrees of freedom, with cells that expect fewer than five pooled into one."""
    assert not counts[probs == 0].any(), "a token was sampled that has no probability"
    expected = probs * counts.sum()
    rare = expected < 5
    counts, expected = np.append(counts[~rare], counts[rare].sum()), np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    return ((counts - expected) ** 2 / expected).sum(), len(counts) - 1


def transition_p_value(ids, probs_after):
    """How likely are counts this far off: of first tokens, and of second tokens after each first one."""
    tests = [chi_square(np.bincount(ids[:, 0], minlength=VOCAB), probs_after(()))]
    for first in np.unique(ids[:, 0]):
        counts = np.bincount(ids[ids[:, 0] == first, 1], minlength=VOCAB)
        tests.append(chi_square(counts, probs_after((first,))))
    statistic, freedom = np.sum(tests, axis=0)
    return stats.chi2.sf(statistic, freedom)


NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
SETTINGS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.8},
    {"top_p": 0.8},
    {"min_p": 0.15},
    {"repetition_penalty": 1.7},
    {"top_k": 5},
    {"top_k": 5, "temperature": 1.3, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
]
PROMPT = [2, 5]


def sample_transitions(settings):
    options = NEUTRAL | settings
    return sample_table(random_table(), [PROMPT], max_new_tokens=2, eos_id=None, num_generations=4000, **options)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_sampled_frequencies_and_recorded_log_probs_are_those_of_the_exact_distribution(settings):
    table, completions = np.asarray(random_table()), sample_transitions(settings)
    ids = np.asarray(completions.ids)

    def probs_after(tokens, **settings):
        history = [*PROMPT, *tokens]
        return exact_probs(table[history[-1]], history, **settings)

    p_value = transition_p_value(ids, functools.partial(probs_after, **settings))
    print(f"{settings}: p = {p_value:.3f}")
    assert p_value > 0.001
    unfiltered = {"temperature": settings.get("temperature", 1.0)}
    for recorded, options in ((completions.sampling_log_probs, settings), (completions.log_probs, unfiltered)):
        expected = [
            [np.log(probs_after(row[:t].tolist(), **options)[row[t]]) for t in range(2)]
            for row in np.unique(ids, axis=0)
        ]
        _, which = np.unique(ids, axis=0, return_inverse=True)
        np.testing.assert_allclose(recorded, np.array(expected)[which], atol=1e-5, rtol=0)


def test_the_chi_square_test_sees_a_distribution_that_is_slightly_off():
    table, ids = np.asarray(random_table()), np.asarray(sample_transitions({}).ids)

    def warmer(tokens):
        return exact_probs(table[[*PROMPT, *tokens][-1]], [], temperature=1.15)

    assert transition_p_value(ids, warmer) < 1e-6


def test_gpt2_samples_its_first_token_from_the_distribution_that_torch_computes():
    data = golden()[2]
    completions = sample_golden(5, data["tokens"][1:2], data["mask"][1:2], max_new_tokens=1, num_generations=4000)
    logits = np.asarray(data["logits"][1, -1], np.float64)
    counts = np.bincount(completions.ids[:, 0], minlength=len(logits))
    p_value = stats.chi2.sf(*chi_square(counts, exact_probs(logits, [])))
    print(f"p = {p_value:.3f}")
    assert p_value > 0.001


# --- keys and rows ----------------------------------------------------------------------------------------------------


def test_the_same_key_gives_the_same_text_and_another_key_another():
    data = golden()[2]
    first, again, other = (sample_golden(seed, data["tokens"], data["mask"]) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert (first.ids != other.ids).any(axis=1).all()


def test_the_text_of_a_row_does_not_depend_on_its_neighbours():
    data = golden()[2]
    ids, mask = data["tokens"], data["mask"]
    expected = sample_golden(2, ids, mask)
    others = ids.at[jnp.array([0, 2])].set((ids[jnp.array([0, 2])] + 7) % 61)
    found = sample_golden(2, others, mask.at[0, :6].set(False))
    np.testing.assert_array_equal(found.ids[1], expected.ids[1])
    np.testing.assert_allclose(found.log_probs[1], expected.log_probs[1], atol=1e-5, rtol=0)
    assert (found.ids[0] != expected.ids[0]).any()


def test_the_text_of_a_row_does_not_depend_on_how_many_rows_follow():
    few = sample_table(random_table(), [[1], [2]], eos_id=None)
    many = sample_table(random_table(), [[1], [2], [3], [4], [5]], eos_id=None)
    chex.assert_trees_all_equal(few, jax.tree.map(lambda leaf: leaf[:2], many))
    assert len(np.unique(many.ids, axis=0)) == 5


def recording(calls):
    """The table model, which notes what it is called with when it is traced."""

    def apply(variables, tokens, *, mask, cache, output="logits"):
        calls.append((tokens.shape, output))
        return table_apply(variables, tokens, mask=mask, cache=cache, output=output)

    return apply


def test_completions_of_one_prompt_are_contiguous_and_share_one_reading_of_it():
    calls, prompts = [], [[1, 2, 3], [4, 5]]
    found = sample_table(random_table(), prompts, num_generations=3, apply=recording(calls))
    assert calls[0] == ((2, 2), "hidden"), "two prompts, without their last tokens"
    assert set(calls[1:]) == {((6, 1), "logits")}
    expected = sample_table(random_table(), [prompts[0]] * 3 + [prompts[1]] * 3)
    chex.assert_trees_all_equal(found, expected)
    assert len(np.unique(found.ids, axis=0)) == 6


# --- the end of a completion ------------------------------------------------------------------------------------------


def test_the_mask_ends_with_the_first_eos_and_padding_follows():
    completions = sample_table(COUNT_UP, [[4], [0, 1], [6]])
    assert completions.ids.tolist() == [
        [5, 6, 7, PAD, PAD, PAD],
        [2, 3, 4, 5, 6, 7],
        [7, PAD, PAD, PAD, PAD, PAD],
    ]
    np.testing.assert_array_equal(completions.mask, completions.ids != PAD)
    for log_probs in (completions.log_probs, completions.sampling_log_probs):
        np.testing.assert_array_equal(log_probs[~np.asarray(completions.mask)], 0)
    chex.assert_type([*completions], [jnp.int32, bool, jnp.float32, jnp.float32])


def test_any_of_several_eos_ids_ends_a_row_and_none_at_all_ends_no_row():
    several = sample_table(COUNT_UP, [[0], [4]], eos_id=(7, 3))
    assert several.ids.tolist() == [[1, 2, 3, PAD, PAD, PAD], [5, 6, 7, PAD, PAD, PAD]]
    endless = sample_table(COUNT_UP, [[5]], eos_id=None)
    assert endless.ids.tolist() == [[6, 7, 0, 1, 2, 3]]
    assert endless.mask.all()


def test_an_eos_in_the_prompt_ends_nothing_and_the_pad_id_may_be_sampled():
    completions = sample_table(COUNT_UP, [[7]], pad_id=2)
    assert completions.ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert completions.mask.all()


def test_the_loop_ends_as_soon_as_every_row_has():
    steps = []

    def counting(variables, tokens, *, mask, cache, output="logits"):
        if output == "logits":
            jax.debug.callback(lambda: steps.append(1))
        return table_apply(variables, tokens, mask=mask, cache=cache, output=output)

    for prompts, expected in (([[5], [6]], 2), ([[6], [6]], 1), ([[3], [6]], 4), ([[7], [6]], 8), ([[0], [0]], 7)):
        steps.clear()
        completions = sample_table(COUNT_UP, prompts, max_new_tokens=50, apply=counting)
        jax.block_until_ready(completions)
        jax.effects_barrier()
        assert len(steps) == expected == completions.mask.sum(1).max(), prompts


def test_ended_rows_are_masked_from_the_model():
    seen = []

    def watching(variables, tokens, *, mask, cache, output="logits"):
        if output == "logits":
            jax.debug.callback(lambda mask: seen.append(mask[:, 0].tolist()), mask, ordered=True)
        return table_apply(variables, tokens, mask=mask, cache=cache, output=output)

    jax.block_until_ready(sample_table(COUNT_UP, [[4], [6]], apply=watching))
    jax.effects_barrier()
    assert seen == [[True, True], [True, False], [True, False]]


# --- shapes, programs, transformations --------------------------------------------------------------------------------


def test_a_prompt_of_one_token_can_fill_all_positions_of_the_model():
    module, params, _ = golden()
    length = module.config.context_length
    ids, mask = jnp.array([[5], [60]]), jnp.ones((2, 1), bool)
    completions = sample_golden(0, ids, mask, max_new_tokens=length, eos_id=None)
    tokens = jnp.concatenate([ids, completions.ids], axis=1)
    logits, _ = jax.jit(module.apply)({"params": params}, tokens[:, :-1])
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits), completions.ids[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(completions.log_probs, expected, atol=1e-4, rtol=0)


def test_sampling_is_one_program_for_every_temperature_filter_and_prompt():
    def sample(table, key, ids, mask, settings):
        return generate(table_apply, table, key, ids, mask, max_new_tokens=3, eos_id=EOS, **settings)

    compiled = jax.jit(chex.assert_max_traces(sample, 1))
    texts = []
    for temperature in (0.0, 0.5, 2.0):
        settings = {"temperature": temperature, "top_p": 1 - temperature / 10, "min_p": temperature / 100}
        ids = jnp.array([[1, 2], [3, int(2 * temperature)]])
        texts.append(compiled(random_table(), jax.random.key(0), ids, ids > 0, settings))
    assert all(np.isfinite(text.log_probs).all() for text in texts)
    np.testing.assert_array_equal(texts[0].sampling_log_probs, 0)
    assert (texts[2].sampling_log_probs[:, 0] < 0).all()


def test_vmap_over_parameters_and_keys_equals_a_loop():
    module, params, data = golden()
    ids, mask = data["tokens"], data["mask"]
    scales, seeds = [1.0, 0.9], [0, 6]

    def sample(params, key, temperature):
        settings = {"max_new_tokens": 8, "eos_id": EOS_GOLDEN, "temperature": temperature}
        return generate(module.apply, params, key, ids, mask, **settings)

    stacked = jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *(scaled(params, scale) for scale in scales))
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    all_at_once = jax.jit(jax.vmap(jax.vmap(sample, (None, 0, None)), (0, None, None)))(stacked, keys, 1.0)
    lengths = set()
    for i, scale in enumerate(scales):
        for j, seed in enumerate(seeds):
            found = jax.tree.map(lambda leaf, at=(i, j): leaf[at], all_at_once)
            expected = sample_golden(seed, ids, mask, scale=scale)
            np.testing.assert_array_equal(found.ids, expected.ids)
            np.testing.assert_array_equal(found.mask, expected.mask)
            np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-5, rtol=0)
            lengths.add(int(expected.mask.any(0).sum()))
    assert len(lengths) > 1, "the loops of the members must end at different steps for this test to mean much"


def test_prompts_may_have_a_short_integer_type():
    ids, mask = jnp.array([[1, 2], [3, 4]], jnp.int16), jnp.ones((2, 2), int)
    settings = {"max_new_tokens": 3, "pad_id": 50_256}
    shapes = jax.eval_shape(lambda: generate(table_apply, random_table(), jax.random.key(0), ids, mask, **settings))
    assert shapes.ids.dtype == jnp.int32


def test_sampling_differs_from_greedy_only_by_the_draw():
    """At a very low temperature the draw is the largest logit."""
    table = random_table(1)
    cold, greedy = (sample_table(table, [[1], [2]], temperature=t, eos_id=None) for t in (1e-4, 0.0))
    np.testing.assert_array_equal(cold.ids, greedy.ids)
    np.testing.assert_allclose(cold.log_probs, 0, atol=1e-6)


# --- errors -----------------------------------------------------------------------------------------------------------


def sample_badly(ids=((1, 2),), mask=((1, 1),), **settings) -> Completions:
    arguments = jnp.array(ids, int), jnp.array(mask, int)
    return generate(table_apply, random_table(), jax.random.key(0), *arguments, **({"max_new_tokens": 2} | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"num_generations": 0}, "num_generations must be at least 1, got 0"),
        ({"temperature": -0.1}, r"temperature must be at least 0 \(0 is greedy\), got -0.1"),
        ({"temperature": float("nan")}, "temperature must be .*got nan"),
        ({"top_k": -1}, r"top_k must be at least 0 \(0 keeps all tokens\), got -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.01}, r"top_p must be in \(0, 1\], got 1.01"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
        ({"min_p": 1.1}, r"min_p must be in \[0, 1\], got 1.1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be positive \(1 changes nothing\), got 0.0"),
        ({"mask": [[1, 1, 0]]}, r"prompt_mask must have the shape of prompt_ids, \(1, 2\), got \(1, 3\)"),
        ({"ids": [[]], "mask": [[]]}, r"prompt_ids must have at least one token .*\(1, 0\). Start with a BOS token"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        sample_badly(**settings)


def test_a_completion_that_outgrows_the_model_is_refused():
    module, params, data = golden()
    with pytest.raises(ValueError, match="33 long, and the model has context_length=32"):
        generate(module.apply, params, jax.random.key(0), data["tokens"], data["mask"], max_new_tokens=24)
