"""The sampler against `generate` and the logits processors of transformers, live: `pytest -m parity`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.models import from_pretrained, head_kernel
from jaxrl_llm.rollouts import generate, score_completions
from jaxrl_llm.rollouts.sampling import filter_logits, penalize_repetition

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

SHAPES = [
    {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    {"vocab_size": 1000, "n_positions": 64, "n_embd": 48, "n_layer": 3, "n_head": 3, "tie_word_embeddings": False},
]
NEW_TOKENS = 24


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Torch's threads cost more than they give on models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda s: f"{s['n_layer']}x{s['n_embd']}")
def models(request, tmp_path_factory):
    """A random model in torch, and the same one here."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(**request.param, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0, 0.3)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    module, params, _ = from_pretrained(folder)
    return model, module, params


def random_prompts(vocab_size, lengths, width):
    ids = np.random.RandomState(0).randint(0, vocab_size, (len(lengths), width))
    return ids, np.arange(width) >= width - np.array(lengths)[:, None]


def torch_generate(model, ids, mask, **settings):
    with torch.no_grad():
        return model.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask.astype(int)),
            max_new_tokens=NEW_TOKENS,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
            **settings,
        )


@functools.cache
def greedy(module, **static):
    def decode(params, ids, mask, repetition_penalty):
        settings = {"max_new_tokens": NEW_TOKENS, "temperature": 0, "repetition_penalty": repetition_penalty} | static
        return generate(module.apply, params, jax.random.key(0), ids, mask, **settings)

    return jax.jit(decode)


def our_greedy(module, params, ids, mask, repetition_penalty=1.0, **static):
    return greedy(module, **static)(params, jnp.asarray(ids), jnp.asarray(mask), repetition_penalty)


@functools.cache
def scorer(module):
    def score(params, *arrays, temperature):
        return score_completions(module.apply, head_kernel, params, *arrays, temperature=temperature).log_probs

    return jax.jit(score)


@functools.partial(jax.jit, static_argnames="top_k")
def process(logits, history, mask, temperature, penalty, *, top_k=0, top_p=1.0, min_p=0.0):
    logits = penalize_repetition(logits, history, mask, penalty) / temperature
    return filter_logits(logits, top_k=top_k, top_p=top_p, min_p=min_p)


def test_greedy_decoding_of_left_padded_prompts_is_that_of_transformers(models):
    model, module, params = models
    ids, mask = random_prompts(module.config.vocab_size, (12, 9, 5, 1), 12)
    expected = torch_generate(model, ids, mask, do_sample=False).sequences[:, 12:].numpy()
    np.testing.assert_array_equal(our_greedy(module, params, ids, mask).ids, expected)


def test_greedy_decoding_ends_where_that_of_transformers_ends(models):
    model, module, params = models
    ids, mask = random_prompts(module.config.vocab_size, (12, 9, 5, 1), 12)
    endless = torch_generate(model, ids, mask, do_sample=False).sequences[:, 12:].numpy()
    eos_ids = [int(endless[0, 4]), int(endless[1, 8])]
    expected = torch_generate(model, ids, mask, do_sample=False, eos_token_id=eos_ids).sequences[:, 12:].numpy()
    found = our_greedy(module, params, ids, mask, eos_id=tuple(eos_ids))
    width = expected.shape[1]
    np.testing.assert_array_equal(found.ids[:, :width], expected)
    np.testing.assert_array_equal(found.ids[:, width:], 0)
    ends = np.isin(endless, eos_ids)
    lengths = np.where(ends.any(1), ends.argmax(1) + 1, NEW_TOKENS)
    np.testing.assert_array_equal(found.mask.sum(1), lengths)
    assert len(set(lengths)) > 1


@pytest.mark.parametrize("penalty", [1.3, 3.0, 0.7])
def test_greedy_decoding_with_a_repetition_penalty_is_that_of_transformers(models, penalty):
    """On prompts of one length: transformers counts padding as a token that has been said, and we do not."""
    model, module, params = models
    ids, mask = random_prompts(module.config.vocab_size, (8, 8, 8), 8)
    settings = {"repetition_penalty": penalty}
    expected = torch_generate(model, ids, mask, do_sample=False, **settings).sequences[:, 8:].numpy()
    found = our_greedy(module, params, ids, mask, **settings).ids
    np.testing.assert_array_equal(found, expected)
    assert (found != our_greedy(module, params, ids, mask).ids).any()


SAMPLING = [
    {"temperature": 0.7},
    {"top_k": 10},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"repetition_penalty": 1.5, "temperature": 1.5},
    {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
]


@pytest.mark.parametrize("settings", SAMPLING, ids=str)
def test_the_distribution_of_every_sampled_token_is_that_of_transformers(models, settings):
    """Their text, step by step: their raw logits through our filters, and our scores of their tokens."""
    model, module, params = models
    ids, mask = random_prompts(module.config.vocab_size, (8, 8, 8), 8)
    torch.manual_seed(1)
    # transformers 5 has top_k 50 unless told otherwise
    theirs = torch_generate(model, ids, mask, do_sample=True, **({"top_k": 0} | settings))
    tokens = jnp.asarray(theirs.sequences.numpy())
    temperature, penalty = settings.get("temperature", 1.0), settings.get("repetition_penalty", 1.0)
    filters = {name: value for name, value in settings.items() if name in ("top_k", "top_p", "min_p")}
    for step, (raw, processed) in enumerate(zip(theirs.logits, theirs.scores, strict=True)):
        said = jnp.broadcast_to(jnp.arange(tokens.shape[1]) < 8 + step, tokens.shape)
        found = process(jnp.asarray(raw.numpy()), tokens, said, temperature, penalty, **filters)
        np.testing.assert_array_equal(found > -jnp.inf, processed.numpy() > -np.inf)
        np.testing.assert_allclose(found, processed.numpy(), rtol=1e-6, atol=1e-6)
    completions = tokens[:, 8:]
    arrays = jnp.asarray(ids), jnp.asarray(mask), completions, jnp.ones(completions.shape, bool)
    scored = scorer(module)(params, *arrays, temperature=temperature)
    raw = torch.log_softmax(torch.stack(theirs.logits, dim=1).double() / temperature, dim=-1).numpy()
    expected = np.take_along_axis(raw, np.asarray(completions)[..., None], axis=-1)[..., 0]
    difference = np.abs(scored - expected).max()
    print(f"{settings}: scores of their text differ by {difference:.1e}")
    assert difference < 1e-4


@pytest.mark.parametrize(
    ("name", "values"), [("top_k", (1, 3, 40)), ("top_p", (0.05, 0.5, 0.99)), ("min_p", (0.01, 0.1, 0.9))]
)
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_the_supports_are_those_of_the_warpers(name, values, spread):
    from transformers.generation import logits_process

    warper = {
        "top_k": logits_process.TopKLogitsWarper,
        "top_p": logits_process.TopPLogitsWarper,
        "min_p": logits_process.MinPLogitsWarper,
    }[name]
    logits = np.random.RandomState(0).normal(0, spread, (500, 200)).astype(np.float32)
    for value in values:
        expected = warper(value)(None, torch.tensor(logits)).numpy()
        np.testing.assert_array_equal(filter_logits(jnp.asarray(logits), **{name: value}), expected)


def test_the_penalty_is_that_of_the_processor():
    from transformers.generation import RepetitionPenaltyLogitsProcessor

    draw = np.random.RandomState(0)
    logits, history = draw.normal(0, 3, (200, 50)).astype(np.float32), draw.randint(0, 50, (200, 30))
    for penalty in (0.5, 1.1, 2.0):
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(history), torch.tensor(logits)).numpy()
        real = jnp.ones(history.shape, bool)
        found = penalize_repetition(jnp.asarray(logits), jnp.asarray(history), real, penalty)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=0)
