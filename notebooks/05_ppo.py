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
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 05 · PPO: proximal policy optimization (近端策略优化)
#
# Chapter 4 took one step of the policy gradient and threw the experience away. It would be cheaper to take several steps on
# the same experience. But a batch tells only about the policy that collected it: after a big change it is an old map of
# another town. PPO walks on with the old map, and stops listening to it wherever the walk has gone far enough.

# %%
from jaxrl_llm import xla_cpu

xla_cpu.set_flag()  # some releases of jaxlib compute wrong numbers on CPUs without this flag of XLA

# %%
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxrl_llm.advantages import generalized_advantages
from jaxrl_llm.log_probs import token_entropy, token_log_probs
from jaxrl_llm.losses import policy_gradient_loss, ppo_loss
from jaxrl_llm.recipes.control import ppo
from jaxrl_llm.rollouts.environment import mean_over_episodes

plt.rcParams["figure.dpi"] = 80

# %% [markdown]
# ## The ratio (概率比) and the clip (裁剪)
#
# How much more likely is an action now than when it was taken? That is the ratio $r = \pi_\theta(a|s) / \pi_{old}(a|s)$, and
# PPO maximises
#
# $$ \mathbb{E}\big[\min\big(r A,\ \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon)\, A\big)\big] $$
#
# `ppo_loss` is minus this, from log-probabilities. Three actions by hand, with ε = 0.2, all of probability 0.5 before:
#
# | now | ratio | advantage | $rA$ | clipped | the smaller |
# |---|---|---|---|---|---|
# | 0.75 | 1.5 | +1 | 1.5 | 1.2 | 1.2 |
# | 0.3 | 0.6 | -1 | -0.6 | -0.8 | -0.8 |
# | 0.75 | 1.5 | -1 | -1.5 | -1.2 | -1.5 |

# %%
log_probs, old_log_probs = jnp.log(jnp.array([0.75, 0.3, 0.75])), jnp.log(jnp.array([0.5, 0.5, 0.5]))
advantages = jnp.array([1.0, -1.0, -1.0])
loss, metrics = ppo_loss(log_probs, old_log_probs, advantages, cliprange=0.2)
by_hand = -(1.2 - 0.8 - 1.5) / 3
gradient = jax.grad(lambda x: ppo_loss(x, old_log_probs, advantages, cliprange=0.2)[0])(log_probs)
print(
    "loss:",
    round(float(loss), 4),
    "by hand:",
    round(by_hand, 4),
    "clipped:",
    round(float(metrics["policy/clipfrac_avg"]), 3),
)
print("gradient of each log-probability:", np.round(gradient, 3))

# %% [markdown]
# The first two have no gradient: they have moved far enough in the direction that the advantage asks for. The third has
# moved the wrong way, and the minimum keeps its whole gradient so that it comes back. The picture shows both cases.


# %%
def objective(ratio, advantage):
    return -ppo_loss(jnp.log(ratio)[None], jnp.zeros(1), advantage[None], cliprange=0.2)[0]


ratios = jnp.linspace(0.05, 2, 200)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharex=True)
for ax, advantage in zip(axes, (1.0, -1.0), strict=True):
    clipped = jax.vmap(objective, (0, None))(ratios, jnp.array(advantage))
    ax.plot(ratios, ratios * advantage, ":", color="grey", label="ratio × advantage")
    ax.plot(ratios, clipped, color="tab:blue", label="what PPO maximises")
    ax.axvspan(0.8, 1.2, color="tab:green", alpha=0.15, label="within the clip")
    ax.set(xlabel="ratio (1 = the old policy)", ylabel="objective (advantage)", title=f"advantage {advantage:+.0f}")
    ax.legend()
plt.show()

# %% [markdown]
# At ratio one the clip is far away, and PPO's gradient is that of chapter 4. One more detail of the guide: it takes the
# logarithm of a softmax. A probability that underflows to 0 has the logarithm minus infinity; `token_log_probs` works on
# logits and never makes that probability.

# %%
same = jax.grad(lambda x: ppo_loss(x, old_log_probs, advantages)[0])(old_log_probs)
plain = jax.grad(lambda x: policy_gradient_loss(x, advantages)[0])(old_log_probs)
extreme = jnp.array([[200.0, 0.0]])
log_of_softmax = jnp.log(jax.nn.softmax(extreme))[0, 1]
print("log of softmax:", log_of_softmax, "· token_log_probs:", token_log_probs(extreme, jnp.array([1]))[0])

# %% [markdown]
# ## Advantages: GAE (广义优势估计)
#
# $A$ comes from a critic (评论家) $V$, which PPO trains beside the policy. One step tells
# $\delta_t = r_t + \gamma V(s_{t+1}) - V(s_t)$: how much better it went than expected. GAE adds up those that follow,
# each worth γλ of the one before:
#
# $$ A_t = \delta_t + \gamma \lambda A_{t+1} $$
#
# With λ = 0 one trusts the critic after a single step; with λ = 1 one trusts what really came.

# %%
rewards, values = jnp.array([1.0, 0.0, 2.0]), jnp.array([0.5, 1.0, 1.5])
next_values, ended = jnp.array([1.0, 1.5, 9.0]), jnp.array([False, False, True])
no_limit = jnp.zeros(3, bool)
gae, targets = generalized_advantages(rewards, values, next_values, ended, no_limit, gamma=0.9, lam=0.8)
deltas = np.array([1 + 0.9 * 1.0 - 0.5, 0 + 0.9 * 1.5 - 1.0, 2 - 1.5])  # the 9.0 after the end is not read
gae_by_hand = [deltas[0] + 0.72 * (deltas[1] + 0.72 * deltas[2]), deltas[1] + 0.72 * deltas[2], deltas[2]]
print("GAE:", np.round(gae, 4), "by hand:", np.round(gae_by_hand, 4), "targets of the critic:", np.round(targets, 4))

# %% [markdown]
# ## Where an episode is cut (截断) and where it ends (终止)
#
# A fallen pole has no future. A pole that still stands when the time limit or the batch ends has one, and it is worth
# $V(s_{T})$. The guide's GAE puts 0 there at the end of every segment, and its CartPole example also sets the return to zero
# in the middle of an episode and drops the last buffer if it is not full. What that does shows in a world that pays 1 at
# every step for ever, with γ = 0.98 and a critic that knows the truth, $V = 1 / (1 - \gamma) = 50$. Nothing there is better
# or worse than expected, so all advantages must be 0.

# %%
steps = 64
paid, known = jnp.ones(steps), jnp.full(steps, 50.0)
last, never = jnp.arange(steps) == steps - 1, jnp.zeros(steps, bool)
cut, _ = generalized_advantages(paid, known, known, never, last, gamma=0.98, lam=0.95)
taken_for_a_fall, _ = generalized_advantages(paid, known, known, last, never, gamma=0.98, lam=0.95)
figure, axes = plt.subplots(figsize=(6.5, 3), layout="constrained")
axes.plot(cut, label="time limit told as truncation")
axes.plot(taken_for_a_fall, "--", label="time limit taken for a fall (0 after the end)")
axes.set(
    xlabel="step of the segment", ylabel="advantage (reward)", title="An endless world that pays 1 a step, cut after 64"
)
axes.legend()
plt.show()

# %% [markdown]
# The error reaches back some dozens of steps, and punishes actions that did nothing wrong. On CartPole it can be measured:
# 10 seeds of PPO end with a sampled return of 500.0 with the bootstrap and of 486.1 without
# (`python -m benchmarks.control truncation`).
#
# ## The other two terms: value loss (价值损失) and entropy (熵)
#
# $$ L = L_{clip} + c_v \tfrac12 \mathbb{E}[(V - R)^2] - c_e \mathbb{E}[H], \qquad H = -\sum_a \pi(a) \log \pi(a) $$
#
# The critic learns the targets from above. The entropy bonus is a little curiosity: it pays the policy for not making up its
# mind too early. A fair coin has ln 2 = 0.693 nats, a certain action has none. All three come out of one call.

# %%
entropy = token_entropy(jnp.array([[0.0, 0.0], [0.0, 0.0], [9.0, -9.0]]))
whole, parts = ppo_loss(
    log_probs,
    old_log_probs,
    advantages,
    values=values,
    returns=targets,
    entropy=entropy,
    vf_coef=0.5,
    entropy_coef=0.01,
)
value_term = 0.5 * np.mean((np.array(values) - np.array(targets)) ** 2)
whole_by_hand = by_hand + 0.5 * value_term - 0.01 * np.mean([np.log(2), np.log(2), 0])
print("whole loss:", round(float(whole), 5), "by hand:", round(float(whole_by_hand), 5))
print({name: round(float(x), 4) for name, x in parts.items()})

# %% [markdown]
# ## PPO on CartPole: many runs as one program
#
# `ppo.train(key, config)` is a whole run: play 256 steps in each of 4 environments, estimate advantages, take 10 passes in
# minibatches, and again. It is a pure function of the key and of the numbers in the config, so one `jit` of a `vmap` runs
# five seeds for each of three ε: a narrow clip, the usual one, and none. Ten passes are many; that is where the clip matters.

# %%
config = ppo.Config(total_timesteps=80_000, num_steps=256, update_epochs=10)
ppo.validate(config)
keys = jax.vmap(jax.random.key)(jnp.arange(5))
epsilons = jnp.array([0.05, 0.2, 1e6])


def curves(clip_eps, key):
    return ppo.train(key, dataclasses.replace(config, clip_eps=clip_eps))[1]


metrics = jax.jit(jax.vmap(jax.vmap(curves, (None, 0)), (0, None)))(epsilons, keys)
metrics = {name: np.asarray(x) for name, x in metrics.items()}
last_quarter = slice(-metrics["loss"].shape[-1] // 4, None)
final = np.asarray(
    mean_over_episodes(metrics["episode/return_mean"][..., last_quarter], metrics["episode/count"][..., last_quarter])
)
kl = metrics["policy/approxkl_avg"]
names = ("ε = 0.05", "ε = 0.2", "no clip")
for name, returns, divergence in zip(names, final, kl, strict=True):
    print(
        f"{name}: last quarter {np.round(returns)}, mean KL {divergence.mean():.4f}, largest {divergence.max():.3f} nats"
    )

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
at = config.steps_per_update * np.arange(1, config.num_updates + 1)
for name, returns, divergence in zip(names, metrics["episode/return_mean"], kl, strict=True):
    left.plot(at, np.nanmean(returns, 0), label=name)
    right.semilogy(at, divergence.mean(0), label=name)
left.set(
    xlabel="environment steps", ylabel="return (steps that the pole stood)", title="PPO on CartPole, mean of 5 seeds"
)
right.set(xlabel="environment steps", ylabel="KL to the old policy (nats)", title="How far an update moves the policy")
left.legend()
right.legend()
plt.show()

# %% [markdown]
# Without a clip the runs are the fastest at first. Then an update goes too far, in the worst case by more than a nat, and
# what was learned is gone; some runs never come back. The narrow clip is the slowest and the steadiest. (The learning rate
# falls to zero at the end, and the KL with it.)
#
# ## What must hold

# %%
np.testing.assert_allclose(loss, by_hand, rtol=1e-5)
np.testing.assert_allclose(gradient, [0, 0, 0.5], atol=1e-6)  # -r A / 3 of the third, nothing of the clipped two
np.testing.assert_allclose(same, plain, atol=1e-6)
assert np.isneginf(log_of_softmax)
assert float(token_log_probs(extreme, jnp.array([1]))[0]) == -200
np.testing.assert_allclose(gae, gae_by_hand, rtol=1e-5)
np.testing.assert_allclose(targets, gae + values, rtol=1e-6)
np.testing.assert_allclose(cut, 0, atol=1e-4)
np.testing.assert_allclose(taken_for_a_fall[-1], -49, atol=1e-4)
assert (taken_for_a_fall[-20:] < -10).all()
np.testing.assert_allclose(whole, whole_by_hand, rtol=1e-4)
assert kl[0].mean() < kl[1].mean() < kl[2].mean() / 3
assert kl[2].max() > 10 * kl[1].max()
assert final[0].min() > 350
assert final[1].mean() > 400
assert final[:2].mean() > final[2].mean()
