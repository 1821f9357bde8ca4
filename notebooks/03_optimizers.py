# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 03 Optimizers 优化器
#
# Training walks down a hill in fog. The gradient (梯度) says which way is down under your feet, and nothing else. An
# optimizer (优化器) decides how far to step, and how much to trust the steps before.
#
# This notebook writes the six usual rules by hand, shows that the library's are the same to rounding, races them on one
# small language model with a step size tuned for each, and looks at warm-up (预热) and schedules (学习率调度).

# %%
from jaxrl_llm import xla_cpu

xla_cpu.set_flag()  # some releases of jaxlib miscompile on CPU without it; it must come before jax

import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jaxrl_llm.data import character_tokenizer, text_windows, wordnet_definitions
from jaxrl_llm.losses import cross_entropy_loss
from jaxrl_llm.models import GPT2, GPT2Config, head_kernel
from jaxrl_llm.optimizers import make_optimizer, make_schedule
from jaxrl_llm.optimizers.first_order import decay_mask
from jaxrl_llm.recipes.text.pretrain import stream
from jaxrl_llm.rollouts import score_tokens

# %% [markdown]
# ## The rules by hand
#
# With gradient $g_t$ and learning rate (学习率) $\eta$:
#
# - SGD (随机梯度下降): $\theta \leftarrow \theta - \eta\, g_t$
# - momentum (动量): $m_t = \mu m_{t-1} + g_t$, and $\theta \leftarrow \theta - \eta\, m_t$
# - RMSprop: $v_t = \rho v_{t-1} + (1-\rho) g_t^2$, and $\theta \leftarrow \theta - \eta\, g_t / (\sqrt{v_t} + \epsilon)$
# - Adam: $m_t = \beta_1 m_{t-1} + (1-\beta_1) g_t$ and $v_t = \beta_2 v_{t-1} + (1-\beta_2) g_t^2$, and
#   $\theta \leftarrow \theta - \eta\, \hat m_t / (\sqrt{\hat v_t} + \epsilon)$
# - AMSGrad: as Adam, with $\max_{s \le t} \hat v_s$ in the place of $\hat v_t$
# - AdamW: as Adam, and $\theta \leftarrow \theta - \eta \lambda \theta$
#
# A ball that rolls keeps its speed: that is momentum. RMSprop gives every parameter a stride of its own, short where
# the ground is steep. Adam does both. Its averages start at zero, which is too small, so they are divided by how much
# of the average has been filled: $\hat m_t = m_t / (1 - \beta_1^t)$ and $\hat v_t = v_t / (1 - \beta_2^t)$ (bias
# correction, 偏差修正).
#
# Weight decay (权重衰减) pulls parameters to zero. Adam with L2 adds $\lambda\theta$ to the gradient, and then divides it
# by $\sqrt{\hat v}$ like all the rest, so a parameter with large gradients is hardly decayed. AdamW takes it off the
# parameter directly.


# %%
def by_hand(name, gradients, theta, lr, decay=0.0):
    """The six rules in numpy; returns the parameters after each step."""
    m = v = largest = np.zeros_like(theta)
    path = []
    for t, g in enumerate(gradients, start=1):
        if name != "adamw":
            g = g + decay * theta
        if name == "sgd":
            step = g
        elif name == "momentum":
            m = 0.9 * m + g
            step = m
        elif name == "rmsprop":
            v = 0.99 * v + 0.01 * g**2
            step = g / (np.sqrt(v) + 1e-8)
        else:
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
            largest = np.maximum(largest, v_hat)
            step = m_hat / (np.sqrt(largest if name == "amsgrad" else v_hat) + 1e-8)
        theta = theta - lr * (step + (decay * theta if name == "adamw" else 0))
        path.append(theta)
    return np.stack(path)


def by_optax(optimizer, gradients, theta):
    """The same gradients through an optax optimizer."""
    params = {"kernel": jnp.asarray(theta, jnp.float32)}
    state, path = optimizer.init(params), []
    for g in gradients:
        updates, state = optimizer.update({"kernel": jnp.asarray(g, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        path.append(np.asarray(params["kernel"]))
    return np.stack(path)


def relative_gap(path, other):
    return np.max(np.abs(path - other).max(axis=0) / np.abs(other - start).max(axis=0))


NAMES = ("sgd", "momentum", "rmsprop", "adam", "adamw", "amsgrad")
random = np.random.default_rng(0)
gradients = random.normal(size=(30, 5)) * [1e-3, 0.1, 1, 10, 100]  # parameters with gradients of very different size
start = random.normal(size=5)
gaps = {}
for name in NAMES:
    library = by_optax(make_optimizer(name, learning_rate=0.01, weight_decay=0.1), gradients, start)
    gaps[name] = relative_gap(library, by_hand(name, gradients, start, 0.01, decay=0.1))
adam_gap = relative_gap(by_optax(optax.adam(0.01), gradients, start), by_hand("adam", gradients, start, 0.01))
print("largest gap, as a share of the way walked:", {name: f"{gap:.0e}" for name, gap in gaps.items()})
print(f"optax.adam against Adam by hand: {adam_gap:.0e} ")

# %% [markdown]
# `make_optimizer` is optax by name, with clipping of the gradient's global norm, weight decay and a learning rate that
# may be a schedule. It does not decay biases and the gains of norms:

# %%
print(decay_mask({"mlp": {"kernel": 0, "bias": 0}, "norm": {"scale": 0}}))

# %% [markdown]
# One thing to see in Adam's rule: on the first step $\hat m = g$ and $\hat v = g^2$, so the step is $\eta$ times the
# sign of the gradient, however small the gradient is. Every parameter moves by the whole learning rate at once, from one
# noisy batch. That is why warm-up helps Adam, below.

# %%
first = by_optax(make_optimizer("adam", learning_rate=0.01), gradients[:1], start)[0]
print("gradient:", gradients[0].round(4), " Adam's first step:", (first - start).round(4))

# %% [markdown]
# ## The race
#
# A one-layer GPT-2 learns to write dictionary definitions (WordNet, which comes with the library), a letter at a time.
# All rules get the same starts and the same batches. A step size that suits SGD is of no use to Adam, so each rule
# first tries a grid of step sizes on two seeds (种子), and is then raced with the best of them on six others. (Naming a
# winner by the seeds that tuned it would reward luck.) The rate rises over 10 steps and then falls to zero in a line.

# %%
texts = [row["completion"] for row in wordnet_definitions()]
tokenizer = character_tokenizer("".join(texts))
windows = np.stack([window.ids for window in text_windows(stream(texts, tokenizer), 16)[:-1]])
train, held_out = windows[:-512], jnp.asarray(windows[-512:])
model = GPT2(
    GPT2Config(vocab_size=len(tokenizer), n_positions=16, n_embd=32, n_layer=1, n_head=2, initializer_range=0.1)
)
BATCH, STEPS, TUNING_SEEDS, SEEDS = 16, 80, (0, 1), (2, 3, 4, 5, 6, 7)


def loss(params, tokens):
    statistics = score_tokens(model.apply, head_kernel, params, tokens, jnp.ones_like(tokens))
    return cross_entropy_loss(statistics.log_probs, jnp.ones_like(statistics.log_probs))[0]


init = jax.jit(lambda seed: model.init(jax.random.key(seed), held_out[:1, :16])["params"])
grads_of_lanes = jax.jit(jax.vmap(jax.value_and_grad(loss)))  # a lane is one run: they all go in one program
held_out_loss = jax.jit(lambda lanes: jax.lax.map(lambda params: loss(params, held_out), lanes))


def optimizer_of(name, rate, **schedule):
    """All rules clip the gradient to norm 1, as is usual for language models; AdamW decays by 0.1."""
    decay = 0.1 if name == "adamw" else 0.0
    rate = make_schedule(rate, **schedule)
    return make_optimizer(name, learning_rate=rate, weight_decay=decay, max_grad_norm=1.0)


@functools.cache
def programs(name, **schedule):
    """Start and update of a rule, for all lanes at once."""

    def start(rate, lane):
        return optimizer_of(name, rate, **schedule).init(lane)

    def update(rate, grads, state, lane):
        updates, state = optimizer_of(name, rate, **schedule).update(grads, state, lane)
        return optax.apply_updates(lane, updates), state

    return jax.jit(jax.vmap(start)), jax.jit(jax.vmap(update))


def run(name, rates, seeds, **schedule):
    """Trains one lane for each (rate, seed) pair; returns the training losses [steps, lanes] and held-out losses."""
    start, update = programs(name, **schedule)
    rates = jnp.asarray(rates, jnp.float32)
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(init(seed) for seed in seeds))
    states = start(rates, params)
    orders = [np.random.default_rng(seed) for seed in seeds]
    losses = []
    for _ in range(STEPS):
        tokens = np.stack([train[order.integers(0, len(train), BATCH)] for order in orders])  # the same for equal seeds
        values, grads = grads_of_lanes(params, jnp.asarray(tokens))
        params, states = update(rates, grads, states, params)
        losses.append(values)
    return np.stack(losses), np.asarray(held_out_loss(params))


GRIDS = {"sgd": (0.1, 0.3, 1), "momentum": (0.01, 0.03, 0.1)}
RACE = {"warmup_steps": 10, "lr_scheduler_type": "linear", "total_steps": STEPS}
ADAPTIVE = (0.003, 0.01, 0.03)
tuned, tuning, curves, finals = {}, {}, {}, {}
for name in NAMES:
    grid = GRIDS.get(name, ADAPTIVE)
    tuning[name] = run(name, np.repeat(grid, 2), TUNING_SEEDS * 3, **RACE)[1].reshape(3, 2).mean(axis=1)
    tuned[name] = grid[int(np.argmin(tuning[name]))]
    curves[name], finals[name] = run(name, [tuned[name]] * len(SEEDS), SEEDS, **RACE)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), dpi=80)
for name in NAMES:
    left.semilogx(GRIDS.get(name, ADAPTIVE), tuning[name], "o-", label=name)
    smooth = np.convolve(curves[name].mean(axis=1), np.ones(10) / 10, "valid")
    right.plot(np.arange(10, STEPS + 1), smooth, label=f"{name}, {tuned[name]:g}")
left.set(xlabel="learning rate", ylabel="held-out loss (nats a letter)", title=f"tuning: 2 seeds, {STEPS} steps")
right.set(xlabel="step", ylabel="training loss (nats a letter)", title="race: 6 other seeds, mean of 10 steps")
left.legend(fontsize=8)
right.legend(fontsize=8, title="rule, learning rate")
plt.tight_layout()
plt.show()

print("rule      rate    held-out loss (nats a letter), mean and deviation over 6 seeds")
for name in sorted(NAMES, key=lambda name: finals[name].mean()):
    print(f"{name:9} {tuned[name]:<7g} {finals[name].mean():.3f} ± {finals[name].std(ddof=1):.3f}")

# %% [markdown]
# RMSprop ends lowest. Momentum comes last: its curve lies flat from step 30 on, at about 2.95 nats. Why is not shown here.
# Between Adam, AdamW, SGD and AMSGrad the gaps are about the deviation over seeds, so this race does not order them, and
# AdamW's decay has no time to matter in 80 steps. The best rates of SGD, momentum, RMSprop and AMSGrad stand at the end of
# their grids: a wider grid may change the order. The left picture says what tuning is worth: a wrong rate costs as much as a
# wrong rule.
#
# ## Schedules and warm-up
#
# `make_schedule` gives the learning rate as a function of the step: up from zero in a straight line, then constant,
# linear or cosine (余弦) decay to zero.

# %%
plt.figure(figsize=(5.5, 2.8), dpi=80)
for kind in ("constant", "linear", "cosine"):
    rate = make_schedule(0.01, lr_scheduler_type=kind, warmup_steps=20, total_steps=STEPS)
    plt.plot([float(rate(step)) for step in range(STEPS + 1)], label=kind)
plt.xlabel("step")
plt.ylabel("learning rate")
plt.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# Adam at three times its tuned peak, the six seeds of the race, with three schedules:

# %%
HIGH = 3 * tuned["adam"]
SCHEDULES = {
    "constant": {},
    "warm-up, constant": {"warmup_steps": 20},
    "warm-up, cosine": {"warmup_steps": 20, "lr_scheduler_type": "cosine", "total_steps": STEPS},
}
scheduled = {label: run("adam", [HIGH] * len(SEEDS), SEEDS, **options)[1] for label, options in SCHEDULES.items()}
print(f"held-out loss at peak {HIGH:g} (nats a letter), mean and deviation over 6 seeds")
for label, values in scheduled.items():
    print(f"{label:18} {values.mean():.3f} ± {values.std(ddof=1):.3f}")

# %% [markdown]
# Warm-up helps where the rate is high: Adam's first steps, each of full length and from hardly any memory, do no damage
# while they are short. Schedules are compared over the same seeds. The decay to zero changes nothing here: 80 steps are too
# few for it to matter.
#
# ## Where Adam fails: AMSGrad
#
# Adam forgets. Suppose that one gradient in 101 is large and points the right way, and the 100 others are small and
# point the other way (the example of Reddi et al., 2018: slope 1010 once, then -10 a hundred times, $x$ in $[-1, 1]$,
# best $x = -1$). The large one is divided by its own size, and its memory fades before the next one comes, so Adam walks
# to the wrong end. AMSGrad keeps the largest $\hat v$ that it has seen, and walks to the right one.


# %%
def walk(name, steps=200_000):
    optimizer = make_optimizer(name, learning_rate=lambda step: 0.5 / jnp.sqrt(step + 1.0), adam_beta2=0.99)

    def step(carry, t):
        x, state = carry
        updates, state = optimizer.update(jnp.where(t % 101 == 0, 1010.0, -10.0), state, x)
        x = jnp.clip(x + updates, -1, 1)
        return (x, state), x

    x = jnp.float32(0)
    return np.asarray(jax.jit(lambda: jax.lax.scan(step, (x, optimizer.init(x)), jnp.arange(steps))[1])())


ends = {name: walk(name)[-20_200:].mean() for name in ("adam", "amsgrad")}
print({name: round(float(end), 2) for name, end in ends.items()}, "best: -1")

# %% [markdown]
# Such data are rare, and in the race AMSGrad and Adam are level. The library's AMSGrad is optax's, which keeps the
# largest of the corrected $\hat v$; PyTorch keeps that of the raw $v$, so the two differ a little early in training.
#
# The tutorial trains in float16 and so needs loss scaling. The library computes in bfloat16 where asked
# (`--dtype bfloat16`): it has the range of float32, so gradients do not vanish.
#
# ## What was shown

# %%
assert max(gaps.values()) < 1e-4  # by hand = the library, to rounding
assert adam_gap < 1e-4  # ... = optax
assert np.allclose(
    first - start, -0.01 * np.sign(gradients[0]), atol=1e-5
)  # Adam's first step has no size but the rate
assert finals["rmsprop"].mean() < finals["sgd"].mean() - 0.03
assert finals["momentum"].mean() > finals["sgd"].mean() + 0.1
assert (scheduled["constant"] - scheduled["warm-up, constant"]).mean() > 0.02  # warm-up helps at a high rate
assert ends["adam"] > 0.5  # Adam walks to the wrong end ...
assert ends["amsgrad"] < -0.5  # ... AMSGrad does not
