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
# # 12 · Which claims of the guide hold (指南中的论断核对)
#
# A recipe says "bake for thirty minutes". Whether that is right depends on the oven, so we bake, and look. This
# notebook takes the claims of the guide one after the other: small experiments are run here, larger ones were
# recorded and stand beside the command that repeats them, and where nothing can be measured it says why. All live
# figures are from a model of a hundred thousand parameters on sums: they show directions, and no sizes for a model of
# seven billion.

# %%
# jaxlib 0.10.2 and 0.11 miscompile some programs on CPU; the flag must be set before jax is imported.
from jaxrl_llm import xla_cpu

xla_cpu.set_flag()

import contextlib
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxrl_llm.advantages import discounted_returns
from jaxrl_llm.data import as_rows, batch_indices, one_digit_sums, split_indices, supervised_example, tokenize_sft_rows
from jaxrl_llm.models import LoraConfig, adapt, join_trainable, split_trainable
from jaxrl_llm.optimizers import make_optimizer
from jaxrl_llm.recipes.text import sft
from jaxrl_llm.recipes.text.language_model import SUMS_TOKENIZER, load_model
from jaxrl_llm.rollouts import score_tokens
from jaxrl_llm.training import init_train_state, make_train_step

plt.rcParams |= {"figure.dpi": 72, "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
here = Path(__file__).resolve() if "__file__" in globals() else Path.cwd() / "notebook"
RESULTS = next(p / "benchmarks/results" for p in here.parents if (p / "benchmarks/results").is_dir())


def recorded(name):
    """Reads a recorded result; says which command makes it."""
    result = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    print(f"{result['command']}    ({result['date']})")
    return result["figures"]


# %% [markdown]
# ## 1 · The live experiments
#
# Fine-tuning (微调) starts from something that knows a little. So a two-layer GPT-2 first learns sums with plus
# alone. Then it is fine-tuned on sums with a minus in them, such as `3-4+5=`, which it has never seen. Every run has
# 160 steps of 32 rows, and is measured on 500 held-out sums: the loss (损失) in nats a token, and the share that a
# greedy answer gets exactly right.
#
# What changes from run to run is data: the rows, the learning rate (学习率), Adam's two $\beta$. So all runs are one
# program, and `vmap` goes over them.

# %%
config = sft.Config(
    tokenizer=SUMS_TOKENIZER, n_layer=2, n_head=4, n_embd=64, n_positions=16, initializer_range=0.1, dataset="sums"
)
with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    model = load_model(config, jax.random.key(0))

sums = one_digit_sums(operators="+-")
plus, minus = ([row for row in sums if ("-" in row["prompt"]) == has] for has in (False, True))
train, held_out = ([minus[i] for i in part] for part in split_indices(len(minus), held_out=1 / 6, seed=0))
shuffled = np.random.default_rng(0).permutation(len(train))
wrong = [row | {"completion": train[i]["completion"]} for row, i in zip(train, shuffled, strict=True)]
wrong = [
    bad if bad["completion"] != row["completion"] else bad | {"completion": "0"}
    for bad, row in zip(wrong, train, strict=True)
]


def batch_of(rows):
    tokens = tokenize_sft_rows(
        [supervised_example(r) for r in as_rows(rows, "sums")], model.tokenizer, max_length=16
    ).rows
    return sft.collate(model.pad_id, tokens, 11)


known, table, test = batch_of(plus), batch_of(train + wrong), batch_of(held_out)
loss_fn = sft.make_loss(model, config)


def measure(params):
    """Loss of a token, and share of rows whose every token is the most likely one: what greedy answering gets right."""
    statistics = score_tokens(model.apply, model.head_kernel, params, test.tokens, test.mask)
    target = test.loss_mask[:, 1:]
    return loss_fn(params, test, jax.random.key(0))[0], jnp.all(statistics.is_argmax | ~target, axis=1).mean()


def make_run(start, rows, evaluations):
    """Makes a run from some parameters, of which all or the adapters are trained."""
    trainable, frozen = split_trainable(start)

    def run(indices, rate, beta1, beta2):
        optimizer = make_optimizer(learning_rate=rate, adam_beta1=beta1, adam_beta2=beta2, max_grad_norm=1.0)
        step = make_train_step(
            lambda params, batch, key: loss_fn(join_trainable(params, frozen), batch, key),
            optimizer,
            weights_fn=sft.batch_weights,
        )

        def stretch(state, some):
            def one(state, chosen):
                return step(state, jax.tree.map(lambda x: x[chosen], rows), jax.random.key(0))[0], None

            state, _ = jax.lax.scan(one, state, some)
            return state, measure(join_trainable(state.params, frozen))

        some = indices.reshape(evaluations, -1, indices.shape[-1])
        state, measured = jax.lax.scan(stretch, init_train_state(trainable, optimizer), some)
        return state.params, measured

    return run


def order(pool, steps, size, seed):
    return np.stack([np.asarray(pool)[batch_indices(len(pool), size, seed=seed, step=i)] for i in range(steps)])


learn_plus = jax.jit(make_run(model.params, known, 1))
base, _ = learn_plus(order(np.arange(len(plus)), 250, 64, 0), 1e-3, 0.9, 0.999)
start_loss, start_right = jax.jit(measure)(base)
print(
    f"{len(train)} rows to learn from; before: loss {start_loss:.2f} nats a token, {start_right:.3f} of sums with a minus right"
)

# %%
steps, evaluations, seeds = 160, 5, 2
n = len(train)
pools = {
    "300 right": np.arange(300),
    "1,000 right": np.arange(1000),
    "1,000 right + 1,500 wrong": np.concatenate([np.arange(1000), n + np.arange(1000, 2500)]),
    "2,500 right": np.arange(2500),
}
rates, beta1s, beta2s = (2e-5, 2e-4, 1e-3, 3e-3, 1e-2), (0.0, 0.9), (0.9, 0.99, 0.999)
runs = [(pool, seed, 1e-3, 0.9, 0.999) for pool in pools.values() for seed in range(seeds)]
runs += [(np.arange(n), 0, rate, 0.9, 0.999) for rate in rates]
runs += [(np.arange(n), 0, 1e-3, beta1, beta2) for beta1 in beta1s for beta2 in beta2s]
indices = np.stack([order(pool, steps, 32, seed) for pool, seed, *_ in runs])
numbers = [jnp.array([run[place] for run in runs]) for place in (2, 3, 4)]
_, (losses, rights) = jax.jit(jax.vmap(make_run(base, table, evaluations)))(indices, *numbers)

adapted = adapt(jax.random.key(1), base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
same = (
    np.stack([order(np.arange(n), steps, 32, 0)] * len(rates)),
    jnp.array(rates),
    *(jnp.full(len(rates), b) for b in (0.9, 0.999)),
)
_, (lora_losses, lora_rights) = jax.jit(jax.vmap(make_run(adapted, table, evaluations)))(*same)

losses, rights = np.asarray(losses), np.asarray(rights)
quality = {name: slice(i * seeds, (i + 1) * seeds) for i, name in enumerate(pools)}
after = len(pools) * seeds
full = losses[after : after + len(rates), -1]
of_betas = losses[after + len(rates) :, -1].reshape(len(beta1s), len(beta2s))
share = {name: float(rights[part, -1].mean()) for name, part in quality.items()}
for name, part in quality.items():
    lowest, last = losses[part].min(1).round(2), losses[part, -1].round(2)
    print(f"{name:27} right {rights[part, -1].round(3)}, lowest loss {lowest}, last {last}")

# %% [markdown]
# ### Quality of data against quantity (数据质量与数量)
#
# *"Quality matters more than quantity."* Add 1,500 rows with wrong answers to 1,000 right ones, and far fewer sums
# come out right: no more than from 300 right rows alone. **That holds.** But quantity is no enemy of quality: with
# 2,500 right rows the held-out loss is less than half of what it is with 1,000 (though in so few steps no more sums
# come out right yet). And look at the loss of the mixed rows: it is *lower* than that of the 1,000 right ones, for a
# model that has seen contradictions is less sure of its mistakes. Judge by the loss alone, and the wrong rows look
# good.
#
# (On film reviews a bag of words learned from 8,000 pairs is right in 0.88 of held-out pairs, a small transformer
# that knows few words in 0.80: `python -m benchmarks.baselines vader_pairs --data data/vader`,
# `python -m benchmarks.offline_runs reward_model`.)
#
# ### Number of epochs (训练轮数)
#
# *"Three epochs."* The right plot has the same runs over epochs. With 300 rows the lowest measured loss is near three
# epochs, with 1,000 near one; afterwards it rises, for the model learns the rows by heart (过拟合). With 2,500 rows
# it still falls when the run ends, after two. **No number fits all: hold rows out, and stop when their loss rises**
# (`--early-stopping-patience`).

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.9))
for place, part in enumerate(quality.values()):
    left.bar(place, rights[part, -1].mean(), color=f"C{place}")
    left.plot([place] * seeds, rights[part, -1], "k.")
left.set(xticks=range(len(pools)), ylabel="held-out sums right", title="160 steps each; dots: two seeds")
left.set_xticklabels([name.replace(" + ", "\n+ ") for name in pools], fontsize=8)
for place, (name, part) in enumerate(quality.items()):
    epochs = np.arange(1, evaluations + 1) * steps / evaluations * 32 / len(pools[name])
    right.plot([0, *epochs], [start_loss, *losses[part].mean(0)], f"C{place}o-", label=name)
right.set(xlabel="epochs", ylabel="held-out loss, nats a token", yscale="log", title="Epochs")
right.legend(fontsize=8)
plt.tight_layout()
plt.show()

# %% [markdown]
# ### Learning rates (学习率): all parameters, LoRA, small models
#
# *"2e-5 for all parameters, ten times that for LoRA; more for small models."* For this model both of the guide's
# rates are too small. **"Small models want more" holds.** Far below the best rate LoRA does need a larger one to come
# equally far, as the guide says. But the best rate itself is not ten times as large. The guide's rates for models of
# billions of parameters cannot be measured here.
#
# In GRPO and its kin the rate decides more than the method: 0.805 of sums right with 1e-4 and 0.697 with 1e-3
# (`python -m benchmarks.online_methods tune --iterations 100`).
#
# ### Adam's $\beta_1$ and $\beta_2$
#
# *"Keep 0.9 and 0.999."* The right picture has the held-out loss for six pairs at one learning rate. **Holds as a
# default:** it is close to the best of them. But they hardly differ, so here it was not $\beta$ that mattered.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8.5, 2.9))
left.plot(rates, full, "o-", label="all parameters")
left.plot(rates, lora_losses[:, -1], "s-", label="LoRA r 8, all linear layers")
left.axhline(float(start_loss), color="gray", ls="--", label="before")
left.set(
    xscale="log",
    yscale="log",
    xlabel="learning rate",
    ylabel="held-out loss, nats a token",
    title="160 steps of 32 rows",
)
left.legend()
image = right.imshow(of_betas, cmap="viridis_r")
right.set(xticks=range(3), xticklabels=beta2s, yticks=range(2), yticklabels=beta1s, xlabel="β2", ylabel="β1")
right.set_title("held-out loss, nats a token, rate 1e-3")
right.grid(False)
for (i, j), value in np.ndenumerate(of_betas):
    right.text(j, i, f"{value:.2f}", ha="center", va="center", color="white", bbox={"color": "black", "alpha": 0.4})
plt.tight_layout()
plt.show()
best_full, best_lora = rates[int(full.argmin())], rates[int(np.argmin(lora_losses[:, -1]))]
print(f"best rate: all parameters {best_full:g} (loss {full.min():.2f}),", end=" ")
print(f"LoRA {best_lora:g} (loss {np.min(lora_losses[:, -1]):.2f})")
print("loss by rate: all parameters", full.round(2), "LoRA", np.round(lora_losses[:, -1], 2))

# %% [markdown]
# ### float16
#
# The guide trains in float16 (半精度). Its smallest numbers are near 6e-8 and its largest is 65,504: small gradients
# vanish and large sums overflow unless the loss is scaled. bfloat16 has the range of float32 and fewer digits, so it
# needs no scaling. The library computes in bfloat16 (`--dtype bfloat16`) and keeps what is trained in float32.

# %%
for dtype in (jnp.float16, jnp.bfloat16):
    tiny, huge = jnp.float32(1e-8).astype(dtype), jnp.float32(7e4).astype(dtype)
    print(f"{np.dtype(dtype).name:9} a gradient of 1e-8 becomes {tiny}, 70,000 becomes {huge}")

rewards, discount = jnp.array([10.0, 5.0, 3.0, 1.0]), jnp.full(4, 0.9)
worked = float(discounted_returns(rewards[:, None], discount[:, None], jnp.zeros(1))[0, 0])
print(f"the guide's worked return: {worked:.3f} (it says 17.73)")

# %% [markdown]
# ## 2 · Memory and speed, recorded
#
# *"A model of 7B needs 28 GB to train, 12 with LoRA, 4 with QLoRA."* Compiled for a Llama of 7B, one row of 512
# tokens, nothing allocated. 28 GB are the weights in float32 alone; AdamW keeps two more numbers and a gradient for
# each.

# %%
memory = recorded("memory")
for claim, verdict in memory["verdicts"].items():
    print(f"  {claim}: {verdict}")
update, timed = recorded("online_memory"), recorded("online_memory_measured")
online, bounds = recorded("online_compare"), recorded("control_trpo_bounds")
betas = recorded("offline_dpo_betas")


def ratio(figures, key, above, below):
    return figures[above][key] / figures[below][key]


grpo, mb, parameters = "grpo with reference", "megabytes", "trained_parameters"
ratios = {
    "memory, GRPO with a reference : PPO with a value network": ratio(update, mb, grpo, "ppo"),
    "memory, the same : PPO with a value head": ratio(update, mb, grpo, "ppo, shared network"),
    "seconds, PPO with a value network : GRPO": ratio(timed, "seconds", "ppo", grpo),
    "seconds, PPO with a value head : GRPO": ratio(timed, "seconds", "ppo, shared network", grpo),
    "seconds of an iteration on sums, PPO : GRPO": ratio(online, "seconds_per_iteration", "ppo", "grpo"),
    "seconds of an update, DPO : SFT": ratio(timed, "seconds", "dpo", "sft"),
    "share of parameters that LoRA r 8 trains": ratio(update, parameters, "sft + LoRA", "sft"),
}
print()
for name, value in ratios.items():
    print(f"  {name}: {value:.4f}" if value < 0.01 else f"  {name}: {value:.2f}")
kls = [betas[f"beta={beta}/after/kl"] for beta in (0.05, 0.1, 0.2, 0.5, 1.0)]
print("  DPO's KL to the reference for β 0.05, 0.1, 0.2, 0.5, 1.0:", np.round(kls, 2))
print("  TRPO, mean training return by bound:", {name: round(f["train_return_mean"], 1) for name, f in bounds.items()})
falls = online["trpo"]["share_of_intervals_that_fell"]
print(f"  TRPO on sums: held-out accuracy fell in {falls:.0%} of the intervals of ten iterations")

# %% [markdown]
# ## 3 · All claims
#
# Commands are `python -m benchmarks.<name>`.
#
# | claim | verdict | evidence |
# |---|---|---|
# | quality of data before quantity | holds; but more right rows are better too | live |
# | three epochs | depends on the data; hold rows out | live |
# | 2e-5 for all parameters, 2e-4 for LoRA | cannot be measured here for large models | too small for a small one: live |
# | small models want larger rates | holds | live |
# | LoRA wants ten times the rate | more at small rates; its best rate is not ten times as large | live |
# | $\beta_1 = 0.9$, $\beta_2 = 0.999$ | holds as a default | live |
# | 7B: 28 GB for all parameters | wrong: 108 GB without activations | `memory` |
# | 7B: 12 GB with LoRA | within an eighth: 13.5, peak 14.6 | `memory` |
# | 7B: 4 GB with QLoRA | holds before activations: 4.2, peak 5.3 | `memory` |
# | GRPO takes half of PPO's memory | true of a value network of its own; not of a value head, nor with LoRA | `online_memory` |
# | GRPO is twice as fast | 1.2 to 1.5 times; 3.2 with four updates | `online_memory --measured`, `online_methods compare` |
# | LoRA trains 0.1 to 1 % | holds: 0.24 % of GPT-2 124M | `online_memory` |
# | DPO is the cheapest: no reward model | true; 1.4 times SFT's time an update | `online_memory --measured` |
# | a larger β lets DPO move further | the opposite | notebook 08, `offline_runs dpo_betas` |
# | TRPO is slower but monotone | slower: true. Monotone: no | `online_methods compare` |
# | TRPO: small δ slow and safe, large δ fast and unstable | holds | `control trpo_bounds` |
# | GRPO needs no reward model | it needs no critic; a reward it needs | notebook 06 |
# | GRPO comes from DeepSeek-V3 | from DeepSeekMath, arXiv 2402.03300 | the papers |
# | float16 for training | works with loss scaling; bfloat16 needs none | live |
# | the worked return is 17.73 | 17.659 | live |
# | 85 against 87 points, "beats GPT-4" | cannot be checked: no source, no task, no model is named | – |
# | JAX is 4,000 times as fast | cannot be measured here | see below |
#
# The 4,000 are a figure of PureJaxRL: the sum over 2,048 agents that train at once on one GPU, divided by one run of
# CleanRL. One run alone is about ten times as fast by its own account. There is neither that GPU nor CleanRL in this
# notebook. What can be said: ten seeds of PPO on CartPole as one program make 89,000 environment steps a second
# together on one shared CPU core (`python -m benchmarks.control ppo_cartpole_default`).

# %%
# What the text and the table claim.
last = {name: float(losses[part, -1].mean()) for name, part in quality.items()}
assert share["1,000 right"] > share["1,000 right + 1,500 wrong"] + 0.03, "wrong rows harm the answers"
assert share["1,000 right + 1,500 wrong"] < share["300 right"] + 0.03, "no more than from 300 right rows"
assert last["2,500 right"] < 0.7 * last["1,000 right"], "more right rows are better"
assert last["1,000 right + 1,500 wrong"] < last["1,000 right"] - 0.2, "the loss alone hides wrong rows"
small, large = losses[quality["300 right"]].mean(0), losses[quality["2,500 right"]].mean(0)
assert small[-1] > small.min() + 0.1, "few rows: the held-out loss rises again"
assert large[-1] == large.min(), "many rows: it still falls"
assert best_full >= 1e-3, "a small model wants at least fifty times the guide's rate"
assert full[0] > full.min() + 0.5, "which hardly teaches it"
assert best_lora < 10 * best_full, "LoRA's best rate is less than ten times as large"
assert of_betas[1, 2] < of_betas.min() + 0.2, "0.9 and 0.999 are close to the best"
assert np.ptp(of_betas) < 0.3, "and the betas hardly matter"
assert lora_losses[0, -1] > full[0] + 0.3, "at a small rate LoRA lags behind"
assert float(jnp.float32(1e-8).astype(jnp.float16)) == 0 < float(jnp.float32(1e-8).astype(jnp.bfloat16))
assert not np.isfinite(float(jnp.float32(7e4).astype(jnp.float16)))
np.testing.assert_allclose(worked, 10 + 0.9 * 5 + 0.81 * 3 + 0.729 * 1, rtol=1e-6)
seven = memory["gigabytes"]["llama-7b"]["sft"]
counted = {way: seven[way]["weights_optimizer_reference_gradients"] for way in seven}
np.testing.assert_allclose(list(counted.values()), [108, 13.5, 4.2], rtol=0.02)
memory_ratios, speed_ratios = list(ratios.values())[:2], list(ratios.values())[2:5]
np.testing.assert_allclose(memory_ratios, [0.54, 1.0], atol=0.03)
np.testing.assert_allclose(speed_ratios, [1.5, 1.2, 3.2], atol=0.15)
assert 0.001 < ratios["share of parameters that LoRA r 8 trains"] < 0.01
assert np.all(np.diff(kls) < 0)
assert falls > 0.2
assert bounds["δ = 0.1"]["train_return_mean"] < 450 < bounds["δ = 0.001"]["train_return_mean"]
assert np.median(bounds["δ = 0.001"]["solved_at"]) > np.median(bounds["δ = 0.01"]["solved_at"])
print("All claims of this notebook hold.")
