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
# # 11 · CartPole end to end (CartPole 完整实战)
#
# The chapters before had one idea each. This one has a task: teach a cart to balance a pole, look at the result, and then
# teach it a second time from examples, as language models are taught: first imitation, then reinforcement.

# %%
from jaxrl_llm import xla_cpu

xla_cpu.set_flag()  # some releases of jaxlib compute wrong numbers on CPUs without this flag of XLA

# %%
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxrl_llm.distributions import make_distribution
from jaxrl_llm.losses import cross_entropy_loss
from jaxrl_llm.optimizers import make_optimizer
from jaxrl_llm.recipes.control import ppo
from jaxrl_llm.rollouts import reset, rollout
from jaxrl_llm.rollouts.environment import evaluate
from jaxrl_llm.training import init_train_state, make_train_step

plt.rcParams["figure.dpi"] = 80

# %% [markdown]
# ## The task and the network
#
# The agent observes four numbers: position and velocity of the cart, angle and angular velocity of the pole. It pushes to the
# left or to the right. Each step that the pole stands pays 1; a fall terminates (终止) the episode, and after 500 steps it is
# truncated (截断).
#
# The guide's ActorCritic (演员-评论家) has one trunk of two layers of 128 ReLU units with two heads, one for the policy and
# one for the value. `ppo.PRESETS["guide-shared"]` holds it with the guide's other settings; on the command line it is
# `jaxrl-llm control ppo --preset guide-shared`.
#
# Its loop is not ours: the guide drops the last buffer if it is not full and sets the return to zero in the middle of an
# episode. Here the value of the last state stands for what is still to come, at the end of a batch and at the time limit.

# %%
config = dataclasses.replace(ppo.PRESETS["guide-shared"], total_timesteps=90_000)
ppo.validate(config)
env, env_params = config.environment()
shapes = jax.tree.map(lambda x: x.shape, config.init_params(jax.random.key(0)))
num_params = sum(np.prod(s) for s in jax.tree.leaves(shapes, is_leaf=lambda s: isinstance(s, tuple)))
print("parts:", sorted(shapes), "· parameters:", int(num_params), "· updates:", config.num_updates)

# %% [markdown]
# ## Training (训练)
#
# Each update plays 2,048 steps and goes over them ten times in minibatches of 64. Three seeds train at once.

# %%
seeds = 3
keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
trained, metrics = jax.jit(jax.vmap(lambda key: ppo.train(key, config)))(keys)
scratch = np.asarray(metrics["episode/return_mean"])
print("sampled return, mean of the last 10 updates:", np.round(np.nanmean(scratch[:, -10:], axis=1)))

# %% [markdown]
# ## Test: greedy episodes (贪心测试)
#
# In training the agent draws its actions. In the test it takes the likeliest one, in 100 fresh episodes that it never saw.
# `evaluate` plays them side by side.

# %%
greedy = ppo.ALGORITHM.policies(config)["greedy"]
agents = ppo.ALGORITHM.agent(trained)


@jax.jit
@jax.vmap
def test(agent, key):
    return evaluate(greedy, agent, key, env, env_params, 100)[0]


test_keys = jax.random.split(jax.random.key(1_000), seeds)
untrained = ppo.ALGORITHM.agent(jax.vmap(lambda key: ppo.init(key, config))(keys))
before, after = np.asarray(test(untrained, test_keys)), np.asarray(test(agents, test_keys))
print("greedy return of each seed: before", np.round(before.mean(1), 1), "after", np.round(after.mean(1), 1))

# %% [markdown]
# One episode of each, seen from the pole. Beyond 12 degrees it counts as fallen.


# %%
def angles(agent):
    start = reset(jax.random.key(7), env, env_params, 1)
    _, steps = rollout(greedy, agent, jax.random.key(8), env, env_params, start, 500)
    ended = np.asarray(steps.terminated | steps.truncated)[:, 0]
    length = int(np.argmax(ended)) + 1 if ended.any() else 500
    return np.degrees(np.asarray(steps.final_observation)[:length, 0, 2])


first = jax.tree.map(lambda x: x[0], (untrained, agents))
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
at = config.steps_per_update * np.arange(1, config.num_updates + 1)
for seed, line in enumerate(scratch):
    left.plot(at, line, label=f"seed {seed}")
left.set(xlabel="environment steps", ylabel="return (steps that the pole stood)", title="Training, sampled actions")
left.legend()
for name, agent in zip(("untrained", "trained"), first, strict=True):
    right.plot(angles(agent), label=name)
right.axhspan(-12, 12, color="tab:green", alpha=0.1, label="standing")
right.set(xlabel="step of the episode", ylabel="angle of the pole (degrees)", title="One greedy episode")
right.legend()
plt.show()

# %% [markdown]
# ## A second pupil: behaviour cloning (行为克隆)
#
# The guide's chapter 10 proposes to copy a teacher first. So a new pupil watches the trained agent. Each state with the
# teacher's action is an example, and the pupil minimises the cross entropy (交叉熵)
#
# $$ L = -\frac1N \sum_i \log \pi_\theta(a_i \mid s_i) $$
#
# It is the loss of supervised fine-tuning, with actions in the place of tokens, and it is the same function:
# `cross_entropy_loss`. For two examples to which the pupil gives the probabilities 0.9 and 0.6:

# %%
loss, _ = cross_entropy_loss(jnp.log(jnp.array([0.9, 0.6])), jnp.ones(2))
loss_by_hand = -(np.log(0.9) + np.log(0.6)) / 2
print("loss:", round(float(loss), 4), "by hand:", round(loss_by_hand, 4))

# %% [markdown]
# The lesson is short: 250 steps of the teacher, half an episode. The exam is 2,000 steps of the same teacher from other
# episodes.

# %%
teacher = first[1]


def watch(key, num_envs, num_steps):
    start_key, key = jax.random.split(key)
    start = reset(start_key, env, env_params, num_envs)
    _, steps = rollout(greedy, teacher, key, env, env_params, start, num_steps)
    batch = {"features": config.features(steps.observation), "action": steps.action}
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)


lesson, exam = watch(jax.random.key(20), 1, 250), watch(jax.random.key(21), 8, 250)


def clone_loss(params, batch, key):
    logits, _ = config.forward(params, batch["features"])
    log_probs = make_distribution(logits).log_prob(batch["action"])
    return cross_entropy_loss(log_probs, jnp.ones_like(log_probs))


adam = make_optimizer("adam", learning_rate=1e-3)
clone_step = make_train_step(clone_loss, adam)


@jax.jit
@jax.vmap
def clone(key):
    params_key, step_key = jax.random.split(key)
    start = init_train_state(config.init_params(params_key), adam)
    end, history = jax.lax.scan(lambda state, _: clone_step(state, lesson, step_key), start, length=150)
    logits, _ = config.forward(end.params, exam["features"])
    return end.params, history["loss"], jnp.mean(jnp.argmax(logits, -1) == exam["action"])


clone_keys = jax.vmap(jax.random.key)(100 + jnp.arange(seeds))
cloned, clone_losses, agreement = clone(clone_keys)
cloned_agents = agents._replace(params=cloned)
cloned_test = np.asarray(test(cloned_agents, test_keys))
print(
    "same action as the teacher in the exam:",
    np.round(agreement, 3),
    "· greedy return:",
    np.round(cloned_test.mean(1), 1),
)

# %% [markdown]
# ## From the clone on: PPO (强化微调)
#
# A clone knows what the teacher did in the teacher's states. After a small mistake of its own it is somewhere the teacher
# never was, and nobody showed it what to do there. PPO lets it practise. Nothing is new but the start: the state of `ppo.init`
# with the clone's parameters in it.
#
# The comparison is with the runs from scratch above: same network, same settings, same number of steps. The teacher's own
# training is not counted, as for a human who shows how it is done.

# %%
short = dataclasses.replace(config, total_timesteps=45_000)


@jax.jit
@jax.vmap
def continue_with_ppo(params, key):
    init_key, update_key = jax.random.split(key)
    start = ppo.init(init_key, short)._replace(train=init_train_state(params, short.optimizer()))

    def update(state, _):
        return ppo.update(state, short, jax.random.fold_in(update_key, state.update))

    return jax.lax.scan(update, start, length=short.num_updates)


improved, tuned = continue_with_ppo(cloned, keys)
tuned = np.asarray(tuned["episode/return_mean"])
improved_test = np.asarray(test(ppo.ALGORITHM.agent(improved), test_keys))
print("greedy return after PPO from the clone:", np.round(improved_test.mean(1), 1))
updates = short.num_updates
reached = [config.steps_per_update * (1 + np.argmax(lines >= 475, axis=1)) for lines in (scratch, tuned)]
print("environment steps until the episodes of an update had a mean of 475, by seed:")
print("from scratch", reached[0], "· from the clone", reached[1])

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
left.plot(clone_losses.T, color="tab:blue")
left.axhline(np.log(2), color="grey", linestyle=":", label="a guess (ln 2)")
left.set(xlabel="steps of Adam", ylabel="cross entropy (nats)", title="Cloning 250 steps, three seeds")
left.legend()
for name, lines, color in (("from scratch", scratch[:, :updates], "tab:orange"), ("from the clone", tuned, "tab:blue")):
    right.fill_between(at[:updates], np.nanmin(lines, 0), np.nanmax(lines, 0), color=color, alpha=0.2)
    right.plot(at[:updates], np.nanmean(lines, 0), color=color, label=f"{name} (band: all seeds)")
right.set(xlabel="environment steps", ylabel="return (steps that the pole stood)", title="PPO, mean of three seeds")
right.legend()
plt.show()

# %% [markdown]
# The clone begins where the run from scratch needs several updates to come. Then it stands still for a while. Its critic has
# never been taught, and until that knows what a state is worth, its advantages are mostly noise; this is the likely reason.
# After that it is faster, and all three seeds are at 500 before any run from scratch is. Imitation gave the start, practice
# gave the rest. (All three pupils had the same teacher and the same lesson; with another lesson the start is another.)
#
# With ten seeds the guide's network from scratch ends at a sampled return of 499.3 after 200,000 steps
# (`python -m benchmarks.control ppo_guide_shared`).
#
# ## What must hold

# %%
np.testing.assert_allclose(loss, loss_by_hand, rtol=1e-5)
assert num_params == 4 * 128 + 128 + 128 * 128 + 128 + 2 * 128 + 2 + 128 + 1
assert before.mean(1).max() < 250
assert (after.mean(1) > 450).all()
np.testing.assert_allclose(clone_losses[:, 0], np.log(2), atol=0.02)
assert (clone_losses[:, -1] < 0.45).all()
assert (np.array(agreement) > 0.7).all()
assert (cloned_test.mean(1) > 100).all()
assert cloned_test.mean() < after.mean() - 50  # imitation alone is not enough here
assert (improved_test.mean(1) > 400).all()
assert tuned[:, 0].mean() > 2 * scratch[:, 0].mean()  # the head start
assert (scratch.max(1) >= 475).all()
assert (tuned.max(1) >= 475).all()
assert reached[1].mean() < reached[0].mean()
