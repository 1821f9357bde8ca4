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
# # 04 · The basics of reinforcement learning (强化学习基础)
#
# A child learns to cross a frozen pond. Nobody tells it which step was right; it only finds out, at the end, whether it
# reached the other side. Everything in this notebook is that pond. It is small enough for tables, so that every quantity
# that later chapters estimate can be computed exactly here, and every estimate can be checked.
#
# The first cell sets a flag of XLA: some releases of jaxlib compute wrong numbers on CPUs without it.

# %%
from jaxrl_llm import xla_cpu

xla_cpu.set_flag()

# %%
from itertools import pairwise

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxrl_llm.advantages import discounted_returns
from jaxrl_llm.losses import policy_gradient_loss
from jaxrl_llm.recipes.control import reinforce
from jaxrl_llm.recipes.control.tabular import ARROWS
from jaxrl_llm.rollouts.environment import mean_over_episodes
from jaxrl_llm.tabular import (
    FROZEN_LAKE,
    action_values,
    expected_return,
    frozen_lake,
    greedy,
    policy_iteration,
    policy_values,
    q_learning,
    value_iteration,
)

plt.rcParams["figure.dpi"] = 80

# %% [markdown]
# ## A Markov decision process (马尔可夫决策过程, MDP)
#
# The pond has 16 fields: a start S, frozen ice F, holes H, a goal G. The field that one stands on is the **state** (状态)
# $s$; the four directions are the **actions** (动作) $a$. The ice is slippery: one step in three goes where it was meant to,
# the other two to the left or right of that. So a step is a probability $P(s' \mid s, a)$. Reaching G pays a **reward** (奖励)
# of 1, a hole ends the episode with nothing. "Markov" means that the next state depends on the present one alone.
#
# `frozen_lake` makes these tables; the discount γ says how much less a reward is worth one step later.

# %%
lake = frozen_lake(gamma=0.95)
print("\n".join(FROZEN_LAKE))
print("P(s' | s = 0, a = right):", {s: round(float(p), 3) for s, p in enumerate(lake.transition[0, 2]) if p > 0})

# %% [markdown]
# ## The return (回报)
#
# $$ G_t = r_t + \gamma r_{t+1} + \gamma^2 r_{t+2} + \dots = r_t + \gamma G_{t+1} $$
#
# This is `discounted_returns`, which walks backwards from the end. The guide works out one example, rewards 10, 5, 3, 1 with
# γ = 0.9, and says 17.73. It is 17.659: $10 + 0.9 \cdot 5 + 0.81 \cdot 3 + 0.729 \cdot 1$.

# %%
returns = discounted_returns(jnp.array([10.0, 5.0, 3.0, 1.0]), 0.9, 0.0)
by_hand = 10 + 0.9 * 5 + 0.81 * 3 + 0.729 * 1
print("returns of the four steps:", np.round(returns, 3), "by hand:", by_hand)

# %% [markdown]
# ## A policy (策略) and its value (价值)
#
# A policy $\pi(a \mid s)$ gives each action a probability. Its value is the return one may expect from a state. Since a return
# is a reward plus the discounted rest, values obey the Bellman equation (贝尔曼方程):
#
# $$ V_\pi(s) = \sum_a \pi(a \mid s)\, Q_\pi(s, a), \qquad
#    Q_\pi(s, a) = r(s, a) + \gamma \sum_{s'} P(s' \mid s, a)\, V_\pi(s') $$
#
# The right side is `action_values`. One can start from zeros and apply it again and again, which is **policy evaluation**
# (策略评估); each sweep shrinks the error by γ at least. Or, as the equation is linear, solve it at once: `policy_values`.

# %%
random_walk = jnp.full((16, 4), 0.25)
exact = policy_values(lake, random_walk)
values, errors = jnp.zeros(16), []
for _ in range(60):
    values = jnp.sum(random_walk * action_values(lake, values), axis=1)
    errors.append(float(jnp.abs(values - exact).max()))
print("value of the start for a random walk:", round(float(exact[0]), 4))

# %% [markdown]
# ## The best policy: value iteration (价值迭代)
#
# $$ V(s) \leftarrow \max_a Q(s, a) $$
#
# repeats the same sweep with the best action in the place of the average one, until nothing changes (`value_iteration`).
# `policy_iteration` takes the other way round, evaluating exactly and then improving. Both must meet.

# %%
best, also_best = value_iteration(lake), policy_iteration(lake)
optimum, walk = float(expected_return(lake, best.policy)), float(expected_return(lake, random_walk))
print(f"value of the start: {optimum:.4f} at best, {walk:.4f} for the random walk")
print(f"value iteration: {int(best.iterations)} sweeps, policy iteration: {int(also_best.iterations)} improvements")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.semilogy(range(1, 61), errors, label="error of policy evaluation")
left.semilogy(range(1, 61), errors[0] * 0.95 ** np.arange(60), "--", label="bound: first error × γ per sweep")
left.set(xlabel="sweeps", ylabel="largest error of a value (reward)", title="Policy evaluation of a random walk")
left.legend()
image = right.imshow(best.values.reshape(4, 4), cmap="Blues", vmin=0, vmax=1)
letters = "".join(FROZEN_LAKE)
for state in range(16):
    arrow = letters[state] if lake.terminal[state] else ARROWS[int(jnp.argmax(best.policy[state]))]
    shown = arrow if lake.terminal[state] else f"{arrow}\n{best.values[state]:.2f}"
    right.text(state % 4, state // 4, shown, ha="center", va="center")
right.set(title="Best action and value of each field", xticks=[], yticks=[])
figure.colorbar(image, label="expected return (reward)")
plt.show()

# %% [markdown]
# The arrows look odd: in several fields the best action is to walk into the wall, away from a hole. On slippery ice that is
# the one choice that cannot slide into it. No hand-written rule would have been as careful.
#
# ## Learning without a map: Q-learning
#
# Value iteration reads $P$. A walker does not have it and sees only steps $(s, a, r, s')$. Q-learning corrects its table a
# little after each step, towards what the step suggests:
#
# $$ Q(s, a) \leftarrow Q(s, a) + \alpha \big(r + \gamma \max_{a'} Q(s', a') - Q(s, a)\big) $$
#
# `q_learning` is a whole walk as one `lax.scan`. Eight walkers learn at once by `vmap`. After each walk the greedy policy is
# judged exactly, by `expected_return`, not by more walking.


# %%
def learned_value(key, num_steps):
    q = q_learning(key, lake, num_steps=num_steps, learning_rate=0.5, decay=0.01, epsilon=0.3)
    return expected_return(lake, greedy(q)), jnp.abs(q - action_values(lake, best.values)).max()


lengths = [300, 1_000, 3_000, 10_000, 30_000, 100_000]
keys = jax.random.split(jax.random.key(0), 8)
learned, gaps = (
    np.array(x)
    for x in zip(
        *[jax.jit(jax.vmap(lambda key, n=n: learned_value(key, n)))(keys) for n in lengths],
        strict=True,
    )
)

# %%
figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
axes.semilogx(lengths, learned, color="tab:blue", alpha=0.3)
axes.semilogx(
    lengths, learned.mean(1), color="tab:blue", linewidth=2, label="Q-learning: mean of 8 walkers (thin: each)"
)
axes.axhline(optimum, color="black", linestyle="--", label="best possible (value iteration)")
axes.axhline(walk, color="grey", linestyle=":", label="random walk")
axes.set(xlabel="steps walked", ylabel="exact value of the start (reward)", title="Q-learning on the lake")
axes.legend()
plt.show()

# %% [markdown]
# ## The first policy gradient (策略梯度)
#
# Tables end where states cannot be counted. Then the policy itself gets parameters θ, and one climbs the mean return
# $J(\theta)$. The policy gradient theorem says how:
#
# $$ \nabla J = \sum_s d(s) \sum_a \pi_\theta(a \mid s)\, Q_\pi(s, a)\, \nabla \log \pi_\theta(a \mid s) $$
#
# Good actions become more likely, in proportion to how good they were; $d(s)$ counts (discounted) visits. Here both sides
# are exact: on the left the derivative of `expected_return`; on the right minus the gradient of `policy_gradient_loss` over
# all state-action pairs, with $d(s)\,\pi(a \mid s)$ as weights. (That weight is itself a derivative: of $J$ with respect to
# the reward of the pair.)

# %%
logits = jax.random.normal(jax.random.key(1), (16, 4))
policy = jax.nn.softmax(logits)
left_side = jax.grad(lambda z: expected_return(lake, jax.nn.softmax(z)))(logits)
visits = jax.grad(lambda reward: expected_return(lake._replace(reward=reward), policy))(lake.reward)
q_values = action_values(lake, policy_values(lake, policy))


def loss_of_all_pairs(z):
    return policy_gradient_loss(jax.nn.log_softmax(z), q_values, weights=visits)[0]


right_side = -jax.grad(loss_of_all_pairs)(logits)
print(
    "largest entry:",
    float(jnp.abs(left_side).max()),
    "largest difference:",
    float(jnp.abs(left_side - right_side).max()),
)

# %% [markdown]
# Subtracting a **baseline** (基线) $V(s)$ from $Q(s, a)$ changes nothing in the sum, because probabilities sum to 1 and their
# changes to 0. What remains, $A = Q - V$, is the **advantage** (优势): how much better than usual an action is.
#
# But with samples in the place of sums the two are not alike. A sample is $A\, \nabla \log \pi$ at one visited pair, and its
# mean square, the noise, is again an exact sum here.

# %%
advantages = q_values - policy_values(lake, policy)[:, None]
with_baseline = -jax.grad(lambda z: policy_gradient_loss(jax.nn.log_softmax(z), advantages, weights=visits)[0])(logits)
print("largest difference with a baseline:", float(jnp.abs(with_baseline - left_side).max()))

scores = jax.jacobian(jax.nn.log_softmax)(logits)  # ∇ log π of each pair
squares = (scores**2).sum((2, 3))
noise_raw, noise_baseline = (float(jnp.sum(visits * x**2 * squares) / visits.sum()) for x in (q_values, advantages))
print(f"mean square of a sample: {noise_raw:.6f} with Q, {noise_baseline:.6f} with Q - V")

# %% [markdown]
# ## REINFORCE: the same from samples, on CartPole
#
# A cart balances a pole; every step that it stands pays 1, for 200 steps at most here (500 in chapter 11). States are four
# real numbers now, so the policy is a small network. REINFORCE plays whole episodes, puts the observed return $G_t$ in the
# place of $Q$, and takes one step:
#
# $$ \nabla J \approx \mathbb{E}\big[(G_t - b_t)\, \nabla \log \pi_\theta(a_t \mid s_t)\big] $$
#
# `reinforce.train(key, config)` is a whole run as a pure function. Six seeds run at once, with the raw returns first, and
# then with a value network as the baseline and standardised advantages (the defaults).


# %%
def run_seeds(config, seeds=6):
    reinforce.validate(config)
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    _, metrics = jax.jit(jax.vmap(lambda key: reinforce.train(key, config)))(keys)
    last_ten = mean_over_episodes(metrics["episode/return_mean"][:, -10:], metrics["episode/count"][:, -10:])
    return np.asarray(metrics["episode/return_mean"]), np.asarray(last_ten)


short = {"num_updates": 60, "num_envs": 8, "env_params": ("max_steps_in_episode=200",)}
raw_curve, raw = run_seeds(reinforce.Config(**short, baseline="none", normalize_advantage=False))
curve, final = run_seeds(reinforce.Config(**short))
print("mean return of the last 10 updates, six seeds: raw", np.round(raw), "with a baseline", np.round(final))

# %%
figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
for name, lines, color in (("raw returns", raw_curve, "tab:orange"), ("baseline, standardised", curve, "tab:blue")):
    axes.plot(lines.T, color=color, alpha=0.3)
    axes.plot(lines.mean(0), color=color, linewidth=2, label=f"{name}: mean of 6 seeds (thin: each)")
axes.set(xlabel="updates (8 episodes each)", ylabel="return (steps that the pole stood)", title="REINFORCE on CartPole")
axes.legend()
plt.show()

# %% [markdown]
# Raw returns are all positive: whatever was done gets strengthened, most of all what happened in long episodes. That is fast
# at first, and then some seeds forget what they had learned. With the baseline all seeds come close to 200 and stay.
#
# The next chapters keep this gradient and make the steps safer: PPO clips them, TRPO measures them.
#
# ## What must hold

# %%
np.testing.assert_allclose(lake.transition.sum(-1), 1, atol=1e-6)
assert abs(by_hand - 17.659) < 1e-9
np.testing.assert_allclose(returns[0], by_hand, rtol=1e-6)
np.testing.assert_allclose(returns[3], 1.0)
assert abs(float(returns[0]) - 17.73) > 0.07  # what the guide says
assert errors[-1] < 1e-3 * errors[0]
assert all(b <= 0.95 * a + 1e-6 for a, b in pairwise(errors))  # each sweep shrinks the error by γ
np.testing.assert_allclose(best.values, also_best.values, atol=1e-4)
assert optimum > 5 * walk
assert (learned <= optimum + 1e-5).all()  # nobody beats the best
assert learned[-1].mean() > 0.95 * optimum
assert learned[-1].mean() > learned[0].mean() + 0.02
np.testing.assert_allclose(left_side, right_side, atol=1e-6)
np.testing.assert_allclose(left_side, with_baseline, atol=1e-6)
assert float(jnp.abs(left_side).max()) > 1e-4
assert noise_raw > 4 * noise_baseline
assert (final > 170).all()
assert final.mean() > raw.mean() + 10
assert final.min() > raw.min() + 20
