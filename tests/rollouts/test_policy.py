"""TRPO on a small GPT-2: inside the training step, with adapters alone, and against the dense formulas."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.divergences import categorical_kl
from jaxrl_llm.losses import policy_gradient_loss
from jaxrl_llm.models import from_pretrained, head_kernel
from jaxrl_llm.optimizers import categorical_fisher, fisher_vector_product, natural_gradient, natural_gradient_metrics
from jaxrl_llm.reductions import LossWeights, loss_weights
from jaxrl_llm.rollouts import policy_functions, score_completions
from jaxrl_llm.training import init_train_state, make_train_step

GOLDEN = Path(__file__).parents[1] / "golden"
TEMPERATURE, CHUNK, PROMPT = 0.8, 2, 5
close = np.testing.assert_allclose


@functools.cache
def golden(name="gpt2_tied"):
    """A random GPT-2, and three texts cut into prompts and completions; the last completion ends early."""
    module, params, _ = from_pretrained(GOLDEN / name)
    data = {key: jnp.asarray(array) for key, array in np.load(GOLDEN / name / "golden.npz").items()}
    tokens, mask = data["tokens"], data["mask"]
    return module, params, {
        "prompt_ids": tokens[:, :PROMPT],
        "prompt_mask": mask[:, :PROMPT],
        "completion_ids": tokens[:, PROMPT:],
        "completion_mask": mask[:, PROMPT:].at[2, 3:].set(False),
        "advantages": jnp.array([1.0, -0.5, 0.7]),
    }  # fmt: skip


def functions_of(params, batch, weights=None, head=head_kernel, apply=None, **options):
    apply = golden()[0].apply if apply is None else apply
    return policy_functions(
        apply,
        head,
        params,
        *rows_of(batch),
        batch["advantages"],
        weights=weights,
        temperature=TEMPERATURE,
        chunk_size=CHUNK,
        **options,
    )


def rows_of(batch):
    return batch["prompt_ids"], batch["prompt_mask"], batch["completion_ids"], batch["completion_mask"]


def loss_fn(params, batch, key):
    log_probs = score_completions(
        golden()[0].apply, head_kernel, params, *rows_of(batch), temperature=TEMPERATURE, chunk_size=CHUNK
    ).log_probs
    return policy_gradient_loss(log_probs, batch["advantages"], batch["completion_mask"], weights=batch["weights"])


def weights_fn(batch, axis_name):
    return loss_weights(batch["completion_mask"], "sequence_mean", axis_name=axis_name)


OPTIMIZER = natural_gradient(max_kl=0.01, cg_iters=5, cg_damping=0.1)


@functools.cache
def program():
    """The compiled step, used by several tests."""
    _, params, batch = golden()
    step = make_train_step(
        loss_fn,
        OPTIMIZER,
        weights_fn=weights_fn,
        extra_args_fn=lambda params, batch, key: functions_of(params, batch, batch["weights"]),
        optimizer_metrics_fn=natural_gradient_metrics,
    )
    return jax.jit(step).lower(init_train_state(params, OPTIMIZER), batch, jax.random.key(0)).compile()


def dense_logits(params, batch):
    """Logits that predict the tokens of the completions."""
    tokens = jnp.concatenate([batch["prompt_ids"], batch["completion_ids"]], axis=1)
    mask = jnp.concatenate([batch["prompt_mask"], batch["completion_mask"]], axis=1)
    logits, _ = golden()[0].apply({"params": params}, tokens[:, :-1], mask=mask[:, :-1])
    return logits[:, PROMPT - 1 :] / TEMPERATURE


@jax.jit
def dense_evaluation(old, new, batch):
    """Improvement of the surrogate, and KL, by the formulas on logits."""
    weights = weights_fn(batch, None)
    z_old, z_new = (dense_logits(params, batch) for params in (old, new))
    taken = batch["completion_ids"][..., None]
    log_old, log_new = (jnp.take_along_axis(jax.nn.log_softmax(z), taken, -1)[..., 0] for z in (z_old, z_new))
    gain = (jnp.exp(log_new - log_old) - 1) * batch["advantages"][:, None]
    return jnp.sum(weights.policy * gain), jnp.sum(weights.tokens * categorical_kl(z_old, z_new))


def test_each_step_of_a_language_model_stays_in_the_trust_region_and_improves():
    _, params, batch = golden()
    state = init_train_state(params, OPTIMIZER)
    for _ in range(3):
        before = state.params
        state, metrics = program()(state, batch, jax.random.key(0))
        improvement, kl = dense_evaluation(before, state.params, batch)
        close(kl, metrics["trpo/kl"], rtol=1e-2, atol=1e-6)
        close(improvement, metrics["trpo/surrogate_improvement"], rtol=1e-2, atol=1e-5)
        assert metrics["trpo/accepted"] == 1
        assert 0.001 < metrics["trpo/kl"] <= 0.01
        assert metrics["trpo/surrogate_improvement"] > 0
        assert {"loss", "grad_norm", "loss/policy_avg", "trpo/step_fraction", "trpo/cg_residual"} <= set(metrics)
    assert state.step == 3


def test_what_the_optimizer_needs_agrees_with_the_dense_formulas():
    _, params, batch = golden()
    tangent = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(x.size).normal(size=x.shape), x.dtype), params)

    @jax.jit
    def compare(params, tangent):
        weights = weights_fn(batch, None)
        functions = functions_of(params, batch, weights)
        chunked = fisher_vector_product(functions["distribution_fn"], functions["fisher_fn"], params)(tangent)
        dense_fisher = functools.partial(categorical_fisher, weights=weights.tokens)
        dense = fisher_vector_product(lambda params: dense_logits(params, batch), dense_fisher, params)(tangent)
        surrogate, gradient = jax.value_and_grad(functions["surrogate_fn"])(params)
        loss_gradient = jax.grad(lambda params: loss_fn(params, batch | {"weights": weights}, None)[0])(params)
        ascent = jax.tree.map(jnp.negative, loss_gradient)
        return (
            (chunked, dense),
            (gradient, ascent),
            surrogate,
            functions["kl_fn"](params),
            functions["evaluate_fn"](params),
        )

    *pairs, surrogate, kl, both = compare(params, tangent)
    for pair in pairs:
        for found, expected in zip(*map(jax.tree.leaves, pair), strict=True):
            close(found, expected, rtol=1e-3, atol=1e-4 * max(np.abs(expected).max(), 1e-3))
    # The embedding is the head too: both ways must add up.
    assert np.abs(pairs[0][1]["token_embedding"]["embedding"]).max() > 0
    # The ratio is exactly one where the step starts, and the KL exactly zero.
    close(surrogate, np.sum(weights_fn(batch, None).policy * batch["advantages"][:, None]), rtol=1e-6)
    assert kl == 0
    close(both, [surrogate, kl], rtol=1e-6)


def test_fisher_may_be_estimated_from_some_rows():
    _, params, batch = golden()
    first = {name: array[:1] for name, array in batch.items()}

    @functools.partial(jax.jit, static_argnums=1)
    def product(batch, every):
        functions = functions_of(params, batch, fisher_every=every)
        outputs = functions["distribution_fn"](params)
        return outputs, functions["fisher_fn"](outputs, jax.tree.map(jnp.sin, outputs))

    # Every third of three rows is the first, and weighs what all did: the mean over its tokens.
    for found, alone in zip(*map(jax.tree.leaves, (product(batch, 3), product(first, 1))), strict=True):
        assert found.shape == alone.shape
        close(found, alone, rtol=1e-4, atol=1e-5)
    for every in (0, 4):
        with pytest.raises(ValueError, match=f"fisher_every must be from 1 to the number of rows, 3, got {every}"):
            functions_of(params, batch, fisher_every=every)


def test_adapters_alone_are_trained_under_the_same_trust_region():
    module, params, batch = golden()
    rng = np.random.default_rng(0)
    embedding = params["token_embedding"]["embedding"]
    vocab, hidden = embedding.shape
    adapters = {"a": jnp.asarray(rng.normal(size=(vocab, 2)), jnp.float32), "b": jnp.zeros((2, hidden))}

    def merge(adapters):
        return params | {"token_embedding": {"embedding": embedding + adapters["a"] @ adapters["b"]}}

    def apply(variables, *args, **kwargs):
        return module.apply({"params": merge(variables["params"])}, *args, **kwargs)

    @jax.jit
    def step(adapters):
        functions = functions_of(adapters, batch, None, lambda adapters: head_kernel(merge(adapters)), apply)
        grads = jax.grad(lambda adapters: -functions["surrogate_fn"](adapters))(adapters)
        optimizer = natural_gradient(cg_iters=2)
        return optimizer.update(grads, optimizer.init(adapters), adapters, **functions)

    updates, state = step(adapters)
    assert state.accepted
    assert 0 < state.kl <= 0.01
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, adapters)
    assert np.abs(updates["b"]).max() > 0


def test_weights_of_each_term_are_kept_apart():
    _, params, batch = golden()
    rng = np.random.default_rng(0)
    shape = batch["completion_ids"].shape
    policy, tokens = (jnp.asarray(rng.uniform(size=shape), jnp.float32) for _ in range(2))
    nudged = jax.tree.map(lambda x: x * 1.01, params)

    @jax.jit
    def evaluate(policy, tokens):
        return functions_of(params, batch, LossWeights(policy, tokens, tokens))["evaluate_fn"](nudged)

    surrogate, kl = evaluate(policy, tokens)
    close(evaluate(2 * policy, tokens), [2 * surrogate, kl], rtol=1e-5)
    close(evaluate(policy, 2 * tokens), [surrogate, 2 * kl], rtol=1e-5)
    assert kl > 0


def test_a_compiled_step_never_holds_logits_of_all_positions():
    _, params, batch = golden()
    rows, time = batch["completion_ids"].shape
    hidden, vocab = head_kernel(params).shape
    shapes = {tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", program().as_text())}
    with_vocabulary = [shape for shape in shapes if vocab in shape and hidden not in shape]
    assert (rows, CHUNK, vocab) in with_vocabulary, "logits of a chunk exist"
    assert max(int(np.prod(shape)) for shape in with_vocabulary) < rows * time * vocab
