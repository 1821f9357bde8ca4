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
# # 07 · TRPO: trust region policy optimization (信任域策略优化)
#
# Someone walks down a mountain in fog. A fixed length of stride is fine on a meadow and deadly on a ridge. TRPO does not fix
# the length of the stride in parameters; it fixes how much the BEHAVIOUR may change, measures it after each step, and takes
# a shorter one if it was too much. PPO (chapter 5) is the cheap imitation of this.

# %%
from jaxrl_llm import xla_cpu

xla_cpu.set_flag()  # some releases of jaxlib compute wrong numbers on CPUs without this flag of XLA

# %%
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxrl_llm.divergences import categorical_kl
from jaxrl_llm.optimizers import categorical_fisher, conjugate_gradient, fisher_vector_product, natural_gradient
from jaxrl_llm.recipes.control import trpo
from jaxrl_llm.rollouts.environment import mean_over_episodes

plt.rcParams["figure.dpi"] = 80

# %% [markdown]
# ## The problem
#
# $$ \max_\theta\ \mathbb{E}\Big[\frac{\pi_\theta(a|s)}{\pi_{old}(a|s)} A\Big]
#    \quad \text{so that} \quad \mathbb{E}\big[\mathrm{KL}(\pi_{old} \,\|\, \pi_\theta)\big] \le \delta $$
#
# The Kullback-Leibler divergence (KL 散度) says how different two distributions are, in nats. `categorical_kl` is exact. By
# hand, from a fair coin to one of 0.8 and 0.2:

# %%
fair, biased = jnp.zeros(2), jnp.log(jnp.array([0.8, 0.2]))
kl_by_hand = 0.5 * np.log(0.5 / 0.8) + 0.5 * np.log(0.5 / 0.2)
print("KL:", float(categorical_kl(fair, biased)), "by hand:", kl_by_hand)

# %% [markdown]
# ## Natural gradient (自然梯度) and the Fisher matrix (费舍尔信息矩阵)
#
# Near $\theta_{old}$ the KL is a bowl, $\tfrac12 \Delta^\top F \Delta$, and $F$, the Fisher matrix, is its curvature. The
# steepest ascent with that bowl as the yardstick is not $g$ but
#
# $$ x = F^{-1} g, \qquad \Delta = \sqrt{\frac{2\delta}{x^\top F x}}\; x $$
#
# where the square root stretches $x$ until the bowl says exactly δ.
#
# A tiny policy shows it: three states, three actions, logits linear in four features. `fisher_vector_product` multiplies
# with $F$ and never builds it. Its columns must be the second derivatives of the mean KL.

# %%
features = jax.random.normal(jax.random.key(0), (3, 4))
theta = 0.5 * jax.random.normal(jax.random.key(1), (12,))
gains = jnp.array([[1.0, 0.0, -1.0], [0.5, -0.5, 0.0], [0.0, 2.0, -1.0]])  # what each action is worth in each state


def logits_of(params):
    return features @ params.reshape(4, 3)


def mean_kl(params, old=theta):
    return jnp.mean(categorical_kl(logits_of(old), logits_of(params)))


def expected_gain(params):
    return jnp.mean(jnp.sum(jax.nn.softmax(logits_of(params)) * gains, axis=-1))


def fisher_fn(outputs, tangents):
    return categorical_fisher(outputs, tangents, weights=jnp.full(3, 1 / 3))


product = fisher_vector_product(logits_of, fisher_fn, theta)
fisher = jax.vmap(product)(jnp.eye(12))
hessian = jax.hessian(mean_kl)(theta)
print("largest entry:", float(jnp.abs(fisher).max()), "largest difference:", float(jnp.abs(fisher - hessian).max()))
print("a fair coin by hand, p (z - <p, z>):", categorical_fisher(fair, jnp.array([1.0, 0.0]), weights=jnp.array(1.0)))

# %% [markdown]
# ## Conjugate gradients (共轭梯度)
#
# A network of a million parameters has an $F$ of $10^{12}$ numbers, so nobody inverts it. `conjugate_gradient` solves
# $F x = g$ from products alone, one for each iteration. After as many iterations as there are dimensions it is exact, and
# after a few it is often good enough. (Here seven of twelve do: three states with three probabilities that sum to 1 have only
# six directions to move in.) A little damping, $F + \lambda I$, keeps directions out that the data say nothing of.

# %%
gradient = jax.grad(expected_gain)(theta)
damped = fisher_vector_product(logits_of, fisher_fn, theta, damping=0.01)
solution = np.linalg.solve(np.array(fisher, np.float64) + 0.01 * np.eye(12), np.array(gradient, np.float64))
residuals = []
for iterations in range(1, 13):
    found, residual = conjugate_gradient(damped, gradient, iterations=iterations)
    residuals.append(float(jnp.linalg.norm(residual) / jnp.linalg.norm(gradient)))

# %% [markdown]
# ## The line search (线搜索)
#
# The bowl is only an approximation. So TRPO tries the full step, and then shorter ones, and takes the first for which the
# exact KL is at most δ and the objective has risen. `natural_gradient` is all of this as an optax transformation. Optax
# minimises, so it gets the gradient of the loss, which is minus the objective.


# %%
def step(grads, surrogate_fn=expected_gain, max_kl=0.2, **options):
    optimizer = natural_gradient(max_kl=max_kl, cg_damping=0.01, **options)
    return optimizer.update(
        grads,
        optimizer.init(theta),
        theta,
        distribution_fn=logits_of,
        fisher_fn=fisher_fn,
        surrogate_fn=surrogate_fn,
        kl_fn=mean_kl,
    )


updates, report = step(-gradient)
print({name: round(float(x), 4) for name, x in report._asdict().items()})

# %%
fractions = jnp.linspace(0, 1.2, 61)
full = updates / report.step_fraction
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
left.semilogy(range(1, 13), residuals, marker="o")
left.set(xlabel="iterations", ylabel="what remains of the equation (share)", title="Conjugate gradients, 12 parameters")
right.plot(fractions, jax.vmap(lambda f: mean_kl(theta + f * full))(fractions), label="exact KL (nats)")
right.plot(fractions, 0.2 * fractions**2, ":", label="KL of the bowl (nats)")
gained = jax.vmap(lambda f: expected_gain(theta + f * full) - expected_gain(theta))(fractions)
right.plot(fractions, gained, label="objective gained")
right.axhline(0.2, color="black", linestyle="--", label="δ = 0.2 nats")
right.axvline(float(report.step_fraction), color="grey", label="step taken")
right.set(xlabel="share of the full step", ylabel="nats, or gain", title="The line search")
right.legend(fontsize=8)
plt.show()

# %% [markdown]
# The full step would be right if the KL were the bowl. Its exact KL is a little above δ, so the step taken is the next
# shorter one, 0.8 of it.
#
# The natural gradient does not care how a policy is written down. Stretch some parameters by ten, and the plain gradient
# points elsewhere, towards what happens to be scaled up. The natural one gives the same new policy.

# %%
stretch = jnp.where(jnp.arange(12) % 2 == 0, 10.0, 1.0)


def new_policies(scale):
    """Gives the policies after a natural and a plain step, both to a KL near 0.05, from the same policy."""
    start = theta / scale

    def scaled_logits(params):
        return logits_of(scale * params)

    def scaled_gain(params):
        return expected_gain(scale * params)

    grads = jax.grad(scaled_gain)(start)
    optimizer = natural_gradient(max_kl=0.05, cg_iters=30, cg_damping=0.0)
    natural, _ = optimizer.update(
        -grads,
        optimizer.init(start),
        start,
        distribution_fn=scaled_logits,
        fisher_fn=fisher_fn,
        surrogate_fn=scaled_gain,
        kl_fn=lambda params: mean_kl(scale * params),
    )
    plain = grads * jnp.sqrt(2 * 0.05 / (grads @ fisher_vector_product(scaled_logits, fisher_fn, start)(grads)))
    return [jax.nn.softmax(scaled_logits(start + x)) for x in (natural, plain)]


(natural_a, plain_a), (natural_b, plain_b) = new_policies(jnp.ones(12)), new_policies(stretch)
print("largest change of a probability by the stretching, natural:", float(jnp.abs(natural_a - natural_b).max()))
print("largest change of a probability by the stretching, plain:", float(jnp.abs(plain_a - plain_b).max()))

# %% [markdown]
# ## What a wrong sign does
#
# The guide's line search and step have sign errors, it compares the expected improvement with the wrong sign, and it reads
# an `args` that is defined nowhere. Signs matter here because one of them guards the other. With the sign of the gradient
# turned alone, each try makes the objective worse, the search refuses all ten, and the parameters stay as they are, to the
# bit: nothing is ever learned, and no error says so. With the comparison turned too, the step is accepted, stays within δ,
# and makes the policy worse.

# %%
refused, report_refused = step(gradient)
worse, report_worse = step(gradient, surrogate_fn=lambda params: -expected_gain(params))
change = [float(expected_gain(theta + x) - expected_gain(theta)) for x in (updates, refused, worse)]
for name, gain in zip(("right signs", "gradient turned", "comparison turned too"), change, strict=True):
    print(f"{name}: objective gained {gain:+.4f}")

# %% [markdown]
# ## TRPO on CartPole with three bounds
#
# `trpo.train` is a whole run: 4 environments × 500 steps for an update, one natural step of the policy, then 40 steps of
# Adam for the value network, which is a network of its own (a shared one would move the policy out of its region). The bound
# is a number that may be traced, so three bounds × three seeds are one program.

# %%
config = trpo.Config(total_timesteps=48_000, num_steps=500, vf_iters=40)
trpo.validate(config)
bounds = jnp.array([0.001, 0.01, 0.1])
keys = jax.vmap(jax.random.key)(jnp.arange(3))


def curves(max_kl, key):
    return trpo.train(key, dataclasses.replace(config, max_kl=max_kl))[1]


metrics = jax.jit(jax.vmap(jax.vmap(curves, (None, 0)), (0, None)))(bounds, keys)
metrics = {name: np.asarray(x) for name, x in metrics.items()}
means, counts = metrics["episode/return_mean"], metrics["episode/count"]
final = np.asarray(mean_over_episodes(means[..., -6:], counts[..., -6:]))
kl, accepted = metrics["trpo/kl"], metrics["trpo/accepted"] > 0
for bound, returns, divergence, good in zip(bounds, final, kl, accepted, strict=True):
    print(
        f"δ = {bound:g}: last 6 updates {np.round(returns)}, largest KL {divergence.max():.6f}, accepted {good.mean():.0%}"
    )

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
at = config.steps_per_update * np.arange(1, config.num_updates + 1)
for index, (bound, color) in enumerate(zip(bounds, ("tab:blue", "tab:green", "tab:red"), strict=True)):
    left.plot(at, np.nanmean(means[index], 0), color=color, label=f"δ = {bound:g}")
    right.semilogy(at, np.where(accepted, kl, np.nan)[index].T, ".", color=color, markersize=4)
    right.axhline(float(bound), color=color, linestyle="--", label=f"δ = {bound:g}")
right.set_ylim(1e-4, 0.3)
left.set(
    xlabel="environment steps", ylabel="return (steps that the pole stood)", title="TRPO on CartPole, mean of 3 seeds"
)
right.set(
    xlabel="environment steps", ylabel="exact KL of the update (nats)", title="Each step (dot) and its bound (line)"
)
left.legend()
right.legend(loc="lower left", ncols=3, fontsize=8)
plt.show()

# %% [markdown]
# Every dot lies under its line. The guide says that a small δ is slow and safe and a large one fast and unstable, and it is
# so. Over 200,000 steps and ten seeds the sampled return at the end is 500.0, 500.0 and 436.5 for the three bounds
# (`python -m benchmarks.control trpo_bounds`). With the guide's own settings, and the signs of the paper, it is 500.0
# (`python -m benchmarks.control trpo_guide`).
#
# ## What must hold

# %%
np.testing.assert_allclose(categorical_kl(fair, biased), kl_by_hand, rtol=1e-5)
np.testing.assert_allclose(fisher, hessian, atol=1e-5)
assert float(jnp.abs(fisher).max()) > 0.01
np.testing.assert_allclose(found, solution, rtol=1e-2, atol=1e-2)
assert residuals[-1] < 1e-3 < 0.1 < residuals[0]
assert bool(report.accepted)
assert float(report.kl) <= 0.2 < float(mean_kl(theta + full))
np.testing.assert_allclose(report.kl, mean_kl(theta + updates), rtol=1e-5)
assert change[0] > 0 > change[2]
assert not bool(report_refused.accepted)
assert int(report_refused.backtracks) == 10
assert bool(report_worse.accepted)
assert all(np.array_equal(a, b) for a, b in zip(theta + refused, theta, strict=True))
assert float(mean_kl(theta + worse)) <= 0.2  # the KL alone does not see it
np.testing.assert_allclose(natural_a, natural_b, atol=1e-3)
assert float(jnp.abs(plain_a - plain_b).max()) > 0.01
assert (kl <= np.array(bounds)[:, None, None]).all()  # every single step, exactly
early = np.nanmean(means[..., :8], axis=(1, 2))
assert early[2] > 2 * early[0]  # a large bound is fast
assert final[1].mean() > final[0].mean() + 50  # a small one is slow
assert final[1].mean() > 300
assert accepted.mean() > 0.9
