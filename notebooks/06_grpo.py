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
# # 06 · GRPO: graded on a curve (组相对策略优化)
#
# A class answers one question. Nobody knows how hard the question was, so the teacher grades on a curve: an answer is
# good if it is better than the mean of the class. GRPO (group relative policy optimization, 组相对策略优化) does this
# with a language model. The policy (策略) answers each prompt several times. These answers are a group (组). The
# advantage (优势) of an answer is its reward (奖励) compared with the others of its group. PPO asks a second network,
# the critic (评论家), what to expect of a prompt; GRPO asks the group, so it needs no critic. It does need a reward:
# a reward model (奖励模型), or a rule that can be checked.
#
# The source is DeepSeekMath (Shao et al., 2024, arXiv 2402.03300). The guide credits the DeepSeek-V3 report, which
# only used it.

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

from jaxrl_llm.advantages import group_relative_advantages, leave_one_out_advantages
from jaxrl_llm.data import batch_indices
from jaxrl_llm.log_probs import token_log_probs
from jaxrl_llm.losses import grpo_loss
from jaxrl_llm.recipes.quickstart import HELD_OUT
from jaxrl_llm.recipes.text import grpo, sft
from jaxrl_llm.recipes.text.experience import Policy
from jaxrl_llm.recipes.text.iteration import make_sampler, start_state
from jaxrl_llm.recipes.text.language_model import SUMS_TOKENIZER
from jaxrl_llm.recipes.text.online import load_parts
from jaxrl_llm.training import init_train_state, make_train_step

plt.rcParams |= {"figure.dpi": 72, "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}

# %% [markdown]
# ## 1 · The advantage, by hand
#
# $$ A_i = \frac{r_i - \mathrm{mean}(r_1 \dots r_G)}{\mathrm{std}(r_1 \dots r_G) + 10^{-4}} $$
#
# This is `group_relative_advantages`. `scale_rewards` says whose standard deviation (标准差) divides: that of the
# `group`, as in DeepSeekMath, of the whole `batch`, or `none`. The guide's code only subtracts the mean, which is
# `none`. Both are options here.

# %%
rewards = np.array([8.0, 6, 7, 9, 7, 6, 7, 10])
centred = rewards - rewards.mean()
print("mean", rewards.mean(), "| minus the mean", centred)

plain = group_relative_advantages(jnp.asarray(rewards), 8, scale_rewards="none")
scaled = group_relative_advantages(jnp.asarray(rewards), 8, scale_rewards="group")
np.testing.assert_allclose(plain, centred, rtol=1e-6)
np.testing.assert_allclose(scaled, centred / (rewards.std(ddof=1) + 1e-4), rtol=1e-5)
print("divided by", rewards.std(ddof=1).round(3), "|", np.round(scaled, 2))

equal = group_relative_advantages(jnp.full(8, 0.1), 8)
print("eight equal rewards teach nothing:", equal)

# %% [markdown]
# ## 2 · Why the group can stand in for a critic
#
# Any number that does not depend on the answer may be subtracted from its reward: the policy gradient (策略梯度)
# stays the same in the mean, and only its noise changes. Here is a policy with four possible answers and rewards 5,
# 6, 7 and 8. We draw 2,000 groups of eight and take the gradient of `grpo_loss` for each group, once with the raw
# rewards and once with the group's mean subtracted.
#
# The mean of a group contains the answer itself, so the estimate is 7/8 of the true gradient. That changes the step
# size and not the direction. RLOO leaves the answer out of its own mean; its advantage is the same, times 8/7.

# %%
answer_rewards, logits, groups = jnp.array([5.0, 6, 7, 8]), jnp.array([0.5, 0.0, -0.5, 0.0]), 2000


def group_gradient(answers, advantages):
    """Gradient of the GRPO loss of one group; an answer is one token."""
    old = token_log_probs(jnp.broadcast_to(logits, (8, 4)), answers)[:, None]

    def loss(logits):
        log_probs = token_log_probs(jnp.broadcast_to(logits, (8, 4)), answers)[:, None]
        return grpo_loss(log_probs, old, advantages, jnp.ones((8, 1)))[0]

    return -jax.grad(loss)(logits)


answers = jax.random.categorical(jax.random.key(0), logits, shape=(groups, 8))
raw = answer_rewards[answers]
grouped = jax.vmap(lambda r: group_relative_advantages(r, 8, scale_rewards="none"))(raw)
left_out = jax.vmap(lambda r: leave_one_out_advantages(r, 8))(raw)
np.testing.assert_allclose(grouped, left_out * 7 / 8, atol=1e-5)

exact = np.asarray(jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * answer_rewards))(logits))
noise, cosine, length = {}, {}, {}
for name, advantages in {"raw reward": raw, "minus the group's mean": grouped}.items():
    gradients = np.asarray(jax.vmap(group_gradient)(answers, advantages))
    mean = gradients.mean(0)
    noise[name] = gradients.std(0).mean()
    cosine[name] = mean @ exact / np.linalg.norm(mean) / np.linalg.norm(exact)
    length[name] = np.linalg.norm(mean) / np.linalg.norm(exact)
    print(f"{name:24} cosine with the exact one {cosine[name]:.3f}, length {length[name]:.2f}, noise {noise[name]:.3f}")

# %% [markdown]
# ## 3 · The loss, by hand
#
# $$ \ell = -\min\big(r A,\ \mathrm{clip}(r, 1-\epsilon, 1+\epsilon) A\big), \qquad
#    r = \frac{\pi(\text{token})}{\pi_\text{old}(\text{token})} $$
#
# It is PPO's clipped term (裁剪) for every token (词元) of the answer, averaged. `grpo_loss` takes log-probabilities
# (对数概率) of the sampled tokens, and no text. With a reference model, `beta` times an estimate of the KL divergence
# (KL 散度) is added.

# %%
ratio, advantage = np.array([1.5, 1.5, 0.5]), np.array([1.0, -1.0, 1.0])
by_hand = -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage)
old = jnp.log(jnp.full((3, 1), 0.2))
loss, metrics = grpo_loss(old + jnp.log(ratio)[:, None], old, jnp.asarray(advantage), jnp.ones((3, 1)), epsilon=0.2)
print("by hand", by_hand, "mean", by_hand.mean().round(6), "| grpo_loss", round(float(loss), 6))
np.testing.assert_allclose(loss, by_hand.mean(), rtol=1e-5)

gap = -0.3  # log π_ref − log π of one token
penalised, with_kl = grpo_loss(old, old, jnp.zeros(3), jnp.ones((3, 1)), ref_log_probs=old + gap, beta=0.1)
np.testing.assert_allclose(with_kl["kl"], np.exp(gap) - gap - 1, rtol=1e-4)  # the k3 estimate
np.testing.assert_allclose(penalised, 0.1 * (np.exp(gap) - gap - 1), rtol=1e-4)

# %% [markdown]
# **Where the guide is wrong.** Its code scores the new log-probabilities under `no_grad`, so there is nothing to
# differentiate. In JAX the same slip is a `stop_gradient`: the loss looks as before, and no parameter moves. A second
# trap: on the first update the ratio is one and the advantages of a group sum to zero, so the *loss* is 0. Its
# *gradient* is not. GRPO's loss is no measure of progress; watch the reward.
#
# The guide also averages over prompt and answer together, and tokenizes decoded text again, which may give other
# tokens than those that were sampled. The library scores the sampled ids, and masks the prompt.

# %%
tokens, advantages, mask = jnp.log(jnp.full((4, 3), 0.25)), jnp.array([1.0, -1.0, 0.5, -0.5]), jnp.ones((4, 3))
live = jax.value_and_grad(lambda x: grpo_loss(x, tokens, advantages, mask)[0])
frozen = jax.value_and_grad(lambda x: grpo_loss(jax.lax.stop_gradient(x), tokens, advantages, mask)[0])
(first_loss, first_gradient), (_, no_gradient) = live(tokens), frozen(tokens)
print(f"first update: loss {float(first_loss):.4f}, gradient norm {float(jnp.linalg.norm(first_gradient)):.3f}")
print(f"under no_grad: gradient norm {float(jnp.linalg.norm(no_gradient)):.3f}")

# %% [markdown]
# ## 4 · Loss types
#
# A `loss_type` names two things: how much a token weighs, and what happens as the policy moves away from the one that
# sampled.
#
# *Weight.* Take one answer of 2 tokens and one of 8. `grpo` averages over an answer and then over answers, so a token
# of the long one weighs a quarter: long wrong answers are punished little. `dapo` averages over all tokens. `dr_grpo`
# divides by a constant, the longest answer allowed, so that no length enters at all.
#
# *Shape.* PPO's clip cuts the gradient (梯度) off, `cispo` caps its weight and keeps it, `sapo` fades it softly.

# %%
lengths = jnp.arange(8) < jnp.array([[2], [8]])
start = jnp.where(lengths, jnp.log(0.25), 0.0)
weights = {}
for name in ("grpo", "dapo", "dr_grpo"):
    weight_loss = partial(grpo_loss, loss_type=name, max_completion_length=8)
    weights[name] = -jax.grad(lambda x, f=weight_loss: f(x, start, jnp.ones(2), lengths)[0])(start)[:, 0]

ratios = jnp.linspace(0.413, 2.4, 150)  # not on the edges of the clip, where the slope is undefined
shapes = {"dapo": {}, "cispo": {"epsilon_high": 1.6}, "sapo": {}}


def pull(log_ratio, name):
    """Gradient of minus the loss of one token with advantage 1, by its log-probability."""
    old, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
    loss = partial(grpo_loss, loss_type=name, **shapes[name])
    return -jax.grad(lambda x: loss(x.reshape(1, 1), old, one[0], one)[0])(log_ratio)


pulls = {name: jax.vmap(partial(pull, name=name))(jnp.log(ratios)) for name in shapes}
figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.8))
places = np.arange(len(weights))
left.bar(places - 0.2, [w[0] for w in weights.values()], 0.4, label="in the answer of 2 tokens")
left.bar(places + 0.2, [w[1] for w in weights.values()], 0.4, label="in the answer of 8 tokens")
left.set(xticks=places, xticklabels=list(weights), ylabel="weight of one token", title="How much a token counts")
left.legend()
for name, values in pulls.items():
    right.plot(ratios, values, label=name)
right.set(xlabel="ratio π / π_old", ylabel="gradient by the log-probability", title="One token, advantage +1")
right.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# ## 5 · What `scale_rewards` does
#
# Let the reward be 1 for a right answer and 0 for a wrong one, and let $k$ of 8 answers be right. Below is the sum of
# $|A|$ over the group, which is how loudly the prompt speaks in the gradient. Without scaling a prompt with one right
# answer in eight is less than half as loud as one with four. Divided by the group's deviation it is two thirds as
# loud: that one lucky answer has an advantage of 2.5. Dr. GRPO calls this a bias towards prompts that are too easy or
# too hard. In return, `group` makes the step independent of the unit of the reward: with `none`, rewards from 0 to
# 100 mean a hundred times the gradient.
#
# A penalty `beta` is weighed against this too. In the recorded pipeline GRPO went to 14.1 nats from its start where
# PPO stayed at 6.2, for the same reward (`python -m benchmarks.rlhf`), because its advantages are divided and its
# `beta` is not.

# %%
right_answers = np.arange(9)
cases = jnp.asarray((np.arange(8) < right_answers[:, None]).astype(np.float32))
loudness = {}
for scale in ("group", "none"):
    advantages = jax.vmap(partial(group_relative_advantages, group_size=8, scale_rewards=scale))(cases)
    loudness[scale] = np.abs(advantages).sum(1)
plt.figure(figsize=(4.5, 2.6))
for scale, total in loudness.items():
    plt.plot(right_answers, total, "o-", label=f'scale_rewards="{scale}"')
plt.xlabel("right answers in a group of 8")
plt.ylabel("sum of |advantage|")
plt.legend()
plt.show()

# %% [markdown]
# ## 6 · A small real run
#
# The task is sums such as `3-4+5=`. The reward is 1 if the answer is exactly right, else 0: no reward model, no
# critic. First supervised fine-tuning (监督微调) on right answers teaches a two-layer GPT-2 about half of them. Then
# GRPO improves it, and sees only whether its own answers are right: 40 iterations of 32 prompts × 8 answers, with
# three seeds.
#
# A whole iteration (sampling, rewards, advantages, update) is one pure function here, `make_grpo_iteration`. So it
# can be scanned over iterations and mapped over seeds: all three runs are one program.

# %%
sizes = {
    "tokenizer": SUMS_TOKENIZER,
    "n_layer": 2,
    "n_head": 4,
    "n_embd": 64,
    "n_positions": 16,
    "initializer_range": 0.1,
}
taught = sft.Config(**sizes, dataset="sums", eval_fraction=HELD_OUT, learning_rate=1e-3, lr_scheduler_type="constant")
config = grpo.Config(
    **sizes,
    dataset="sums",
    eval_fraction=HELD_OUT,
    reward_funcs=("jaxrl_llm.rewards:exact_match_tokens",),
    traceable_rewards=True,
    num_prompts=32,
    num_generations=8,
    max_completion_length=4,
    learning_rate=3e-4,
    lr_scheduler_type="linear",
    warmup_steps=5,
    max_steps=40,
)
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    parts = load_parts(config, jax.random.key(0))
    data = sft.load_data(taught, parts.model)
model = parts.model


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
params, sft_loss = teach(model.params, rows, order, jax.random.key(0))
print(f"SFT: loss {sft_loss[0]:.2f} -> {sft_loss[-10:].mean():.2f} nats a token")

# %%
policy = Policy(model.apply, model.head_kernel)
ids = {"eos_ids": model.eos_ids, "pad_id": model.pad_id}
prompts = parts.train.batch(np.arange(len(parts.train.tokens)), model.pad_id)
held_out = parts.held_out.batch(np.arange(len(parts.held_out.tokens)), model.pad_id)
optimizer = config.optimizer(config.max_steps)
iteration = grpo.make_grpo_iteration(policy, optimizer, parts.rewards.reward, config, **ids)


def accuracy(params):
    """Share of 512 held-out sums that greedy answers get right."""
    greedy = dataclasses.replace(config, num_generations=1, temperature=0.0)
    completions = make_sampler(policy, greedy, **ids)(params, jax.random.key(0), held_out)
    return jnp.mean(parts.rewards.reward(completions, held_out.columns))


def train(key, indices):
    """One GRPO run from the taught model."""

    def step(state, chosen):
        state, metrics, _ = iteration(state, jax.tree.map(lambda x: x[chosen], prompts), key)
        return state, {name: metrics[name] for name in ("reward", "frac_reward_zero_std", "entropy", "loss")}

    start = start_state(grpo.make_method(config), params, optimizer)
    state, curves = jax.lax.scan(step, start, indices)
    return accuracy(state.train.params), curves


seeds = range(3)
chosen = np.stack(
    [[batch_indices(len(prompts.ids), 32, seed=s, step=i) for i in range(config.max_steps)] for s in seeds]
)
before = float(jax.jit(accuracy)(params))
after, curves = jax.jit(jax.vmap(train))(jax.vmap(jax.random.key)(jnp.arange(3)), chosen)
print(f"held-out sums right, greedy: {before:.3f} -> {np.round(after, 3)} (three seeds)")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.8))
x = np.arange(1, config.max_steps + 1)
smooth = np.stack([np.convolve(reward, np.ones(5) / 5, "valid") for reward in curves["reward"]])
for seed, reward in enumerate(smooth):
    left.plot(x[4:], reward, label=f"seed {seed}")
left.set(xlabel="iteration (256 answers)", ylabel="share of sampled answers right", title="Reward, mean of 5")
left.legend()
right.plot(x, curves["loss"][0], "C3", lw=1)
right.axhline(0, color="black", lw=0.8)
right.set(xlabel="iteration (256 answers)", ylabel="loss", title="The loss of seed 0 says nothing")
plt.tight_layout()
plt.show()
silent = float(curves["frac_reward_zero_std"].mean())
print(f"groups with equal rewards, which teach nothing: {silent:.0%}")

# %% [markdown]
# (The loss wobbles about 0 because answers differ in length: the mean is over tokens, and only their groups sum to
# zero.)
#
# The full-sized comparison is recorded: 200 iterations of 64 × 8 answers take such a start from 0.543 to 0.824 ±
# 0.011 over five seeds; the intervals of RLOO, REINFORCE and PPO overlap with that
# (`python -m benchmarks.online_methods compare`; notebook 09). On a real model, SmolLM2-135M-Instruct, GRPO with LoRA
# goes from 0.38 to 0.72 on 50 held-out sums (`python -m benchmarks.smollm2_grpo --steps 30`). With prompts and
# rewards of your own:
# `jaxrl-llm grpo --dataset prompts.jsonl --model path/to/model --reward-funcs my_rewards.py:helpful`.
#
# ## 7 · Where the guide is wrong about GRPO
#
# | the guide | in fact |
# |---|---|
# | new log-probabilities under `no_grad` | nothing trains: the gradient is exactly zero (section 3) |
# | mean over prompt and answer, of text that is tokenized again | per token of the answer, on the sampled ids |
# | GRPO needs no reward model | it needs no *critic*; its own code calls a reward model. A rule can give the reward, as here |
# | it comes from the DeepSeek-V3 report | DeepSeekMath, arXiv 2402.03300 |
# | the advantage is the reward minus the mean | that is Dr. GRPO's form; DeepSeekMath divides by the deviation too |

# %%
# What the text claims.
assert np.all(np.asarray(equal) == 0), "equal rewards must give advantages of exactly 0"
assert noise["minus the group's mean"] < noise["raw reward"] / 3, "the group's mean must take most of the noise away"
assert min(cosine.values()) > 0.9, "and leave the direction as it is"
assert abs(length["minus the group's mean"] - 7 / 8) < 0.1
assert abs(float(first_loss)) < 1e-6 < float(jnp.linalg.norm(first_gradient))
assert float(jnp.linalg.norm(no_gradient)) == 0, "scores under no_grad teach nothing"
np.testing.assert_allclose(weights["grpo"][0] / weights["grpo"][1], 4, rtol=1e-5)
np.testing.assert_allclose(weights["dapo"][0], weights["dapo"][1], rtol=1e-5)
assert float(pulls["dapo"][-1]) == 0 < float(pulls["sapo"][-1]) < float(pulls["cispo"][-1])
np.testing.assert_allclose(group_relative_advantages(jnp.eye(8)[0], 8)[0], 2.475, atol=0.01)
assert loudness["group"][1] > 0.6 * loudness["group"][4]
assert loudness["none"][1] < 0.5 * loudness["none"][4]
assert 0.4 < before < 0.7
assert np.mean(after) > before + 0.05, "three seeds together must have learned"
assert np.mean(smooth[:, -1]) > np.mean(smooth[:, 0]), "and be rewarded more often"
assert np.abs(curves["loss"]).max() < 0.05, "while the loss stays near 0"
print("All claims of this notebook hold.")
