# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 08 · DPO: learning from comparisons (直接偏好优化)
#
# It is hard to say how good an essay is, and easy to say which of two is better. RLHF (基于人类反馈的强化学习) first
# turns such preferences (偏好) into a reward model (奖励模型), and then lets the language model collect reward. DPO
# (direct preference optimization, 直接偏好优化) leaves the middle man out: the language model itself is read as a
# reward model, and is trained as one. There is no sampling, no critic and no reward model; what remains is a
# classification of pairs.
#
# The source is Rafailov et al., 2023 (arXiv 2305.18290).

# %%
# jaxlib 0.10.2 and 0.11 miscompile some programs on CPU; the flag must be set before jax is imported.
from jaxrl_llm import xla_cpu

xla_cpu.set_flag()

import contextlib
import dataclasses
import io
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jaxrl_llm.data import (
    as_rows,
    batch_indices,
    collate_prompts,
    preference_example,
    prompt_example,
    split_indices,
    tokenize_preference_rows,
    tokenize_prompt,
)
from jaxrl_llm.divergences import categorical_kl
from jaxrl_llm.losses import dpo_loss, sequence_log_probs
from jaxrl_llm.recipes.quickstart import HELD_OUT
from jaxrl_llm.recipes.text import dpo, sft
from jaxrl_llm.recipes.text.language_model import SUMS_TOKENIZER, decode, load_model, load_rows
from jaxrl_llm.recipes.text.pairs import batch_weights, collate_pairs, row_length
from jaxrl_llm.rollouts import generate, score_completions
from jaxrl_llm.training import init_train_state, make_train_step

plt.rcParams |= {"figure.dpi": 72, "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}

# %% [markdown]
# ## 1 · From the objective of RLHF to a loss
#
# RLHF wants much reward, and wants to stay close to a reference model (参考模型), the model of the start:
#
# $$ \max_\pi\ \mathbb{E}_{y \sim \pi}[r(y)] - \beta\, \mathrm{KL}(\pi \,\|\, \pi_\text{ref}) $$
#
# The best policy is known in closed form (闭式解). Each response is made more likely by its reward, and a large
# $\beta$ makes rewards small:
#
# $$ \pi^*(y) \propto \pi_\text{ref}(y)\, e^{r(y)/\beta} \quad\Longleftrightarrow\quad
#    r(y) = \beta \log\frac{\pi^*(y)}{\pi_\text{ref}(y)} + \text{const} $$
#
# So a policy *is* a reward, the implicit reward (隐式奖励). If people prefer $c$ to $r$ with probability
# $\sigma(r(c) - r(r))$ (Bradley and Terry), put the implicit reward in. The constant drops out, and the likelihood of
# what people preferred is a loss for the policy alone:
#
# $$ \mathcal{L} = -\log\sigma(\beta\Delta), \qquad
#    \Delta = \log\frac{\pi(c)}{\pi_\text{ref}(c)} - \log\frac{\pi(r)}{\pi_\text{ref}(r)} $$
#
# That is `dpo_loss`. Two pairs by hand:

# %%
policy_chosen, policy_rejected = np.array([-10.0, -7.0]), np.array([-12.0, -6.0])
ref_chosen, ref_rejected = np.array([-11.0, -7.5]), np.array([-11.0, -7.5])
delta = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
by_hand = np.mean(np.log1p(np.exp(-0.1 * delta)))
loss, metrics = dpo_loss(*map(jnp.asarray, (policy_chosen, policy_rejected, ref_chosen, ref_rejected)), beta=0.1)
print("Δ", delta, "| by hand", by_hand.round(6), "| dpo_loss", round(float(loss), 6))
np.testing.assert_allclose(loss, by_hand, rtol=1e-5)
np.testing.assert_allclose(metrics["rewards/chosen"], np.mean(0.1 * (policy_chosen - ref_chosen)), rtol=1e-5)
at_start, _ = dpo_loss(*map(jnp.asarray, (ref_chosen, ref_rejected, ref_chosen, ref_rejected)), beta=0.1)
np.testing.assert_allclose(at_start, np.log(2), rtol=1e-6)  # a policy that is the reference knows nothing

# %% [markdown]
# ## 2 · It finds the policy that RLHF wants
#
# Four possible responses, known rewards, and all pairs of them with the probabilities that Bradley and Terry give. We
# minimise `dpo_loss` and never show it a reward. What comes out is compared with the closed form, for five values of
# $\beta$.
#
# **Where the guide is wrong.** It says that a larger $\beta$ lets the model move further and overfit. $\beta$ is the
# strength of the pull *to* the reference: the larger, the closer. Here it can be seen exactly, below on a language
# model.

# %%
true_rewards, reference = jnp.array([0.0, 1.0, 2.0, 0.5]), jnp.log(jnp.array([0.4, 0.3, 0.1, 0.2]))
lengths = jnp.array([2.0, 2.0, 8.0, 8.0])  # in tokens, for section 3
first, second = (jnp.asarray(x) for x in np.nonzero(~np.eye(4, dtype=bool)))
preferred = jax.nn.sigmoid(true_rewards[first] - true_rewards[second]) / 6  # 6 pairs, each in both orders


def fit(beta, loss_type="sigmoid"):
    """Minimises the DPO loss over all policies of four responses."""

    def loss(logits):
        log_probs = jax.nn.log_softmax(logits)
        pairs = log_probs[first], log_probs[second], reference[first], reference[second]
        sizes = {"chosen_lengths": lengths[first], "rejected_lengths": lengths[second]}
        return dpo_loss(*pairs, beta=beta, loss_type=loss_type, weights=preferred, **sizes)[0]

    optimizer = optax.adam(optax.cosine_decay_schedule(0.3, 3000))

    def step(carry, _):
        logits, state = carry
        updates, state = optimizer.update(jax.grad(loss)(logits), state)
        return (logits + updates, state), None

    (logits, _), _ = jax.lax.scan(step, (reference, optimizer.init(reference)), length=3000)
    return jax.nn.log_softmax(logits)


exact_betas = jnp.array([0.3, 0.5, 1.0, 2.0, 5.0])
closed = jax.nn.log_softmax(reference + true_rewards / exact_betas[:, None])
learned = jax.jit(jax.vmap(fit))(exact_betas)
exact_kl = categorical_kl(learned, jnp.broadcast_to(reference, learned.shape))
error = float(jnp.abs(jnp.exp(learned) - jnp.exp(closed)).max())
for beta, probabilities, kl in zip(exact_betas, np.exp(learned), exact_kl, strict=True):
    print(f"β = {beta:.1f}: learned {np.round(probabilities, 3)}, KL to the reference {kl:.3f} nats")
print(f"largest difference to the closed form: {error:.4f}")

# %% [markdown]
# ## 3 · The sum over the response, not the mean
#
# $\log\pi(y)$ is the log-probability of the whole response, so the SUM of its tokens' log-probabilities
# (`sequence_log_probs`). The guide takes the mean over prompt and response. Then $\Delta$ is no longer a ratio of
# probabilities, and the closed form above no longer belongs to it: short and long responses are weighed differently,
# and prompt tokens, which are the same on both sides, only dilute the mean.
#
# Let the four responses have 2, 2, 8 and 8 tokens. With averaged margins (`loss_type="sigmoid_norm"`) the same
# preferences lead to another policy, which gives nearly everything to a long response.

# %%
token_log_probs = jnp.array([[-1.0, -2.0, -0.5, -9.0]])
is_response = jnp.array([[False, True, True, False]])  # prompt, two tokens of response, padding
assert float(sequence_log_probs(token_log_probs, is_response)[0]) == -2.5

averaged = jax.jit(partial(fit, loss_type="sigmoid_norm"))(1.0)
away = 0.5 * float(jnp.abs(jnp.exp(averaged) - jnp.exp(closed[2])).sum())
figure, axes = plt.subplots(figsize=(6, 2.8))
bars = {"reference": reference, "closed form, β = 1": closed[2], "DPO, sum": learned[2], "DPO, mean": averaged}
for place, (name, log_probs) in enumerate(bars.items()):
    axes.bar(np.arange(4) + 0.2 * (place - 1.5), np.exp(log_probs), 0.2, label=name)
names = [f"reward {r:g}\n{n:.0f} tokens" for r, n in zip(true_rewards, lengths, strict=True)]
axes.set(xticks=np.arange(4), xticklabels=names, ylabel="probability of the response")
axes.legend()
plt.tight_layout()
plt.show()
print(f"probability mass in the wrong place with the mean: {away:.2f}")

# %% [markdown]
# ## 4 · A small real run
#
# A two-layer GPT-2 learns sums such as `3-4+5=` by supervised fine-tuning (监督微调) until it gets about half of them
# right. Then it answers 1,536 of the training sums eight times each. Where some answers are right and some wrong, one
# of each makes a pair. From these pairs alone DPO must learn to prefer right answers: 120 steps of 32 pairs, with
# five values of $\beta$ and two orders of the data, as one program.

# %%
taught = sft.Config(
    tokenizer=SUMS_TOKENIZER,
    n_layer=2,
    n_head=4,
    n_embd=64,
    n_positions=16,
    initializer_range=0.1,
    dataset="sums",
    eval_fraction=HELD_OUT,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
)
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    model = load_model(taught, jax.random.key(0))
    data = sft.load_data(taught, model)


@jax.jit
def teach(params, rows, indices, key):
    """Supervised fine-tuning, all steps as one program."""
    optimizer = taught.optimizer(len(indices))
    step = make_train_step(sft.make_loss(model, taught), optimizer, weights_fn=sft.batch_weights)
    start = init_train_state(params, optimizer)
    state, metrics = jax.lax.scan(lambda s, i: step(s, jax.tree.map(lambda x: x[i], rows), key), start, indices)
    return state.params, metrics["loss"]


rows = sft.collate(model.pad_id, data.train, max(len(row.ids) for row in data.train))
order = np.stack([batch_indices(len(data.train), 64, seed=0, step=i) for i in range(300)])
start, _ = teach(model.params, rows, order, jax.random.key(0))

sums = load_rows("sums")
parts = [np.asarray(part) for part in split_indices(len(sums), held_out=HELD_OUT, seed=0)]
sample = jax.jit(
    partial(generate, model.apply, max_new_tokens=4, eos_id=model.eos_ids, pad_id=model.pad_id, num_generations=8)
)


def prompts_of(indices):
    ids = [tokenize_prompt(prompt_example(sums[i]).prompt, model.tokenizer) for i in indices]
    batch = collate_prompts(ids, pad_id=model.pad_id, length=max(map(len, ids)))
    return jnp.asarray(batch.prompt_ids), jnp.asarray(batch.prompt_mask)


def make_pairs(indices, key):
    """One right and one wrong answer of the model to each sum that it answers both ways."""
    completions = sample(start, key, *prompts_of(indices))
    texts = np.array(decode(model.tokenizer, completions.ids, completions.mask)).reshape(-1, 8)
    pairs = []
    for index, said in zip(indices, texts, strict=True):
        right = said == sums[index].fields["answer"]
        wrong = ~right & (said != "")  # an empty answer cannot be a row
        if right.any() and wrong.any():
            pair = {"chosen": said[right][0], "rejected": said[wrong][0]}
            pairs.append({"prompt": sums[index].fields["prompt"]} | {k: str(v) for k, v in pair.items()})
    return pairs


asked = np.random.default_rng(0).permutation(parts[0])[:1536]
train_pairs, held_out_pairs = make_pairs(asked, jax.random.key(1)), make_pairs(parts[1], jax.random.key(2))
print(len(train_pairs), "pairs to learn from,", len(held_out_pairs), "held out; the first three:")
for pair in train_pairs[:3]:
    print("  ", pair)

# %%
config = dpo.Config(dataset="pairs", learning_rate=1e-4, lr_scheduler_type="constant", warmup_steps=10)
steps, betas, orders = 120, jnp.array([0.05, 0.2, 0.5, 2.0, 5.0]), 2


def batch_of(pairs):
    """Tokenizes pairs, and scores them under the reference once and for all."""
    examples = [preference_example(row) for row in as_rows(pairs, "pairs")]
    tokens = tokenize_preference_rows(examples, model.tokenizer, max_length=16).rows
    batch = jax.tree.map(jnp.asarray, collate_pairs(model.pad_id, tokens, max(map(row_length, tokens))))
    return batch._replace(reference=jax.jit(dpo.make_reference(model, config))(start, batch))


train_batch, held_out_batch = batch_of(train_pairs), batch_of(held_out_pairs)
held_out_prompts = prompts_of(parts[1])
answers = [sums[i].fields["answer"] for i in parts[1]]


def run(beta, indices):
    """DPO with one β: curves, figures on held-out pairs, KL of own answers to held-out sums, greedy answers."""
    loss_fn = dpo.make_loss(model, dataclasses.replace(config, beta=beta))
    optimizer = config.optimizer(steps)
    step = make_train_step(loss_fn, optimizer, weights_fn=batch_weights)

    def one(state, chosen):
        state, metrics = step(state, jax.tree.map(lambda x: x[chosen], train_batch), jax.random.key(0))
        return state, {name: metrics[name] for name in ("rewards/accuracies", "logps/chosen", "logps/rejected")}

    state, curves = jax.lax.scan(one, init_train_state(start, optimizer), indices)
    params = state.params
    options = {"max_new_tokens": 4, "eos_id": model.eos_ids, "pad_id": model.pad_id}
    said = generate(model.apply, params, jax.random.key(3), *held_out_prompts, num_generations=2, **options)
    text = *(jnp.repeat(x, 2, axis=0) for x in held_out_prompts), said.ids, said.mask
    ref_log_probs = score_completions(model.apply, model.head_kernel, start, *text).log_probs
    kl = jnp.where(said.mask, said.log_probs - ref_log_probs, 0).sum(1).mean()
    greedy = generate(model.apply, params, jax.random.key(4), *held_out_prompts, temperature=0.0, **options)
    return curves, loss_fn(params, held_out_batch, jax.random.key(0))[1], kl, (greedy.ids, greedy.mask)


indices = np.stack([[batch_indices(len(train_pairs), 32, seed=s, step=i) for i in range(steps)] for s in range(orders)])
grid = jnp.repeat(betas, orders), jnp.tile(indices, (len(betas), 1, 1))
curves, held_out, kl, greedy = jax.jit(jax.vmap(run))(*grid)


def share_right(ids, mask):
    texts = decode(model.tokenizer, ids, mask)
    return np.mean([text == answer for text, answer in zip(texts, answers, strict=True)])


options = {"max_new_tokens": 4, "eos_id": model.eos_ids, "pad_id": model.pad_id}
unchanged = generate(model.apply, start, jax.random.key(4), *held_out_prompts, temperature=0.0, **options)
before = share_right(unchanged.ids, unchanged.mask)
by_beta = (len(betas), orders)
kl = np.asarray(kl).reshape(by_beta)
preference = np.asarray(held_out["rewards/accuracies"]).reshape(by_beta)
right = np.array([share_right(*row) for row in zip(*greedy, strict=True)]).reshape(by_beta)
print(f"before: {before:.3f} of held-out sums right, greedy")
for i, beta in enumerate(betas):
    print(
        f"β = {beta:4.2f}: KL {kl[i].round(3)} nats, held-out pairs {preference[i].round(3)}, sums right {right[i].round(3)}"
    )

# %% [markdown]
# The implicit reward accuracy (隐式奖励准确率) is the share of pairs whose chosen response has gained more
# log-probability than the rejected one. At the start it is undefined, for nothing has gained anything.
#
# Read the three columns together. The larger $\beta$, the smaller the KL. But more KL is not more right: with
# $\beta = 0.05$ pairs are told apart nearly as well, and *fewer* sums come out right than at the start; with
# $\beta = 2$ many more do. The right plot shows why. The loss only asks for a *difference*. With a small $\beta$ the
# log-probability of wrong answers falls far, that of right ones falls with them, and the probability goes to answers
# that were in no pair.

# %%
figure, (left, middle, last) = plt.subplots(1, 3, figsize=(10, 2.9))
left.plot(exact_betas, exact_kl, "s--", color="gray", label="four responses, exact")
for s in range(orders):
    left.plot(betas, kl[:, s], "o-", label=f"language model, order {s}")
left.set(xscale="log", yscale="log", xlabel="β", ylabel="KL to the reference, nats", title="A larger β stays closer")
left.legend()
smooth = partial(np.convolve, np.ones(10) / 10, mode="valid")
for i in (0, 2, 4):
    middle.plot(smooth(np.asarray(curves["rewards/accuracies"])[i * orders]), label=f"β = {betas[i]:g}")
middle.set(xlabel="step (32 pairs)", ylabel="implicit reward accuracy", title="Training pairs, mean of 10 steps")
middle.legend()
for name, style in {"logps/chosen": "-", "logps/rejected": "--"}.items():
    for i, color in ((0, "C0"), (4, "C1")):
        values = smooth(np.asarray(curves[name])[i * orders])
        last.plot(values, style, color=color, label=f"{name[6:]}, β = {betas[i]:g}")
last.set(xlabel="step (32 pairs)", ylabel="log-probability of a response, nats", title="What falls, what rises")
last.legend(fontsize=8)
plt.tight_layout()
plt.show()

# %% [markdown]
# One remark to be fair: $\beta$ also multiplies the first gradient, so with plain gradient descent and very few steps
# a larger $\beta$ moves *faster at first*. What $\beta$ sets is where the road ends, and Adam takes its factor out of
# the steps.
#
# On 8,000 pairs of real film reviews the same sweep is recorded: KL 5.34, 3.70, 2.27, 0.93 and 0.54 nats for $\beta$
# 0.05, 0.1, 0.2, 0.5 and 1.0 (`python -m benchmarks.offline_runs dpo_betas`). With $\beta$ 0.1 and 200 steps, 0.758
# of 1,000 held-out pairs are right by the implicit reward (`python -m benchmarks.offline_runs dpo`), and only 0.518
# by the plain log-probability (`python -m benchmarks.offline_runs evaluate`): what DPO learned is to be read off
# against its reference.
#
# On rows of your own: `jaxrl-llm dpo --dataset pairs.jsonl --model path/to/model --beta 0.1`.
#
# ## 5 · Where the guide is wrong about DPO
#
# | the guide | in fact |
# |---|---|
# | mean log-probability over prompt and response | the sum over the response; the mean leads to another policy (section 3) |
# | a larger $\beta$ moves further and overfits | a larger $\beta$ stays closer to the reference (sections 2 and 4) |
# | log of softmax | log-softmax: the log of a rounded-to-zero probability is minus infinity |

# %%
# What the text claims.
assert error < 0.01, "DPO finds the closed form of RLHF"
assert np.all(np.diff(exact_kl) < 0), "a larger β stays closer: exactly"
assert np.all(np.diff(kl.mean(1)) < 0), "a larger β stays closer: on the language model"
assert kl[0].min() > 3 * kl[-1].max()
assert away > 0.1, "the mean over tokens leads elsewhere"
assert 0.4 < before < 0.7
assert preference.mean() > 0.6, "held-out pairs are judged better than by a coin"
assert right.mean(1).max() > before + 0.03, "with a good β sums are answered better"
assert right[0].mean() < right[3].mean() - 0.1, "the smallest β moved furthest, and did not answer best"
assert np.asarray(curves["logps/chosen"])[:orders, -10:].mean() < np.asarray(curves["logps/chosen"])[:, 0].mean()
unsafe = jnp.log(jax.nn.softmax(jnp.array([0.0, -200.0])))
assert not np.isfinite(unsafe[1])
assert np.isfinite(jax.nn.log_softmax(jnp.array([0.0, -200.0]))[1])
print("All claims of this notebook hold.")
