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
# # 10 The whole pipeline 完整流程
#
# Pretraining (预训练), supervised fine-tuning (SFT, 监督微调), a reward model (奖励模型), reinforcement learning with GRPO,
# and DPO (直接偏好优化) beside it: all on one task, with the library's recipes, each stage starting from the model of
# the stage before. After each stage the same score is measured: the share of held-out sums that are answered right.
#
# The task is small so that everything is known. The raw text is a book of sums such as `3+4+5=12`, copied by a careless
# hand: four in ten of them are wrong. So a model that reads the book well writes wrong answers too, as a model that has read
# the internet does. The later stages shall bring out what it knows. (Do they? The last cell tells.)

# %%
from jaxrl_llm import xla_cpu

xla_cpu.set_flag()  # some releases of jaxlib miscompile on CPU without it; it must come before jax

import json
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.utils.capture import capture_output

from jaxrl_llm.data import one_digit_sums, split_indices
from jaxrl_llm.losses import dpo_loss, reward_model_loss
from jaxrl_llm.recipes.options import ModelOptions
from jaxrl_llm.recipes.text import dpo, grpo, pretrain, reward_model, sft
from jaxrl_llm.recipes.text.language_model import SUMS_TOKENIZER, decode, load_model
from jaxrl_llm.recipes.text.model_rewards import load_token_reward
from jaxrl_llm.rollouts import generate, score_completions
from jaxrl_llm.training.logging import read_metrics

folder, random = Path(tempfile.mkdtemp()), np.random.default_rng(0)
rows = one_digit_sums(operators="+")
train, held_out = ([rows[i] for i in part] for part in split_indices(len(rows), held_out=200, seed=0))


def write(name, lines):
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return str(folder / name)


def book(part, copies):
    """Lines of sums in random order; four in ten are off by one, two or three."""
    lines = []
    for _ in range(copies):
        for i in random.permutation(len(part)):
            slip = random.integers(1, 4) * random.choice([-1, 1]) * (random.random() < 0.4)
            lines.append(f"{part[i]['prompt']}{max(int(part[i]['answer']) + slip, 0)}\n")
    return [{"text": "".join(lines)}]


print(book(train, 1)[0]["text"][:60])

# %% [markdown]
# ## 1 Pretraining
#
# The model predicts the next character of the book. No held-out sum occurs in it: a score on sums that were in the
# text would measure memory.

# %%
quiet = {"overwrite": True, "num_samples": 0, "save_steps": 10_000, "eval_steps": 1000, "warmup_steps": 20}
pretraining = pretrain.Config(
    output_dir=str(folder / "pretrain"),
    dataset=write("book.jsonl", book(train, 40)),
    eval_dataset=write("book_held_out.jsonl", book(held_out, 2)),
    tokenizer=SUMS_TOKENIZER + "\n",
    max_length=24,
    max_steps=300,
    per_device_train_batch_size=64,
    learning_rate=3e-3,
    lr_scheduler_type="linear",
    n_layer=2,
    n_head=4,
    n_embd=64,
    n_positions=24,
    initializer_range=0.1,
    **quiet,
)
models, figures = {}, {}


def run(name, recipe, config):
    with capture_output():  # the recipes print tables of their progress
        figures[name] = recipe.run(config)
    return figures[name]["model"]


def load(path):
    return load_model(ModelOptions(model=path), jax.random.key(0))


models["pretrained"] = run("pretrained", pretrain, pretraining)
base = load(models["pretrained"])
print(f"{base.num_params:,} parameters; {figures['pretrained']['eval_bits_per_byte']:.2f} bits per byte, held out")

# %% [markdown]
# ## 2 Supervised fine-tuning
#
# The book goes on from line to line and never stops. A hundred rows of question and right answer show the form: the
# answer, then the end.

# %%
tuning = sft.Config(
    output_dir=str(folder / "sft"),
    model=models["pretrained"],
    dataset=write("sft.jsonl", [train[i] for i in random.choice(len(train), 100, replace=False)]),
    eval_dataset=write("sft_held_out.jsonl", held_out),
    max_steps=30,
    learning_rate=1e-3,
    **quiet,
)
models["SFT"] = run("SFT", sft, tuning)
tuned = load(models["SFT"])

# %% [markdown]
# ## 3 Pairs, and a reward model
#
# The SFT model answers each training question sixteen times, and a judge says which answers are right. The right answer
# of a question and each wrong one make a pair (偏好对). The reward model $r_\phi$ is the SFT model with a head for one
# number. It learns to give the chosen answer $y_w$ more than the rejected one $y_l$ (Bradley and Terry):
#
# $$ L_{\text{RM}} = -\log \sigma\big(r_\phi(x, y_w) - r_\phi(x, y_l)\big) $$

# %%
numbers = {name: np.array([1.5, -0.5])[i] for i, name in enumerate(("chosen", "rejected"))}
hand = np.log1p(np.exp(-(numbers["chosen"] - numbers["rejected"])))
library = float(reward_model_loss(jnp.array([numbers["chosen"]]), jnp.array([numbers["rejected"]]))[0])
print(f"by hand {hand:.6f}, library {library:.6f}")

answer = jax.jit(partial(generate, base.apply, max_new_tokens=4, eos_id=base.eos_ids, pad_id=base.pad_id))


def ask(params, part, times, seed):
    """Samples answers; returns the token arrays and whether each is right, [questions, times]."""
    ids = jnp.repeat(jnp.array([base.tokenizer.encode(row["prompt"]) for row in part]), times, axis=0)
    completions = answer(params, jax.random.key(seed), ids, jnp.ones_like(ids))
    texts = np.array(decode(base.tokenizer, completions.ids, completions.mask)).reshape(-1, times)
    ended = np.isin(np.asarray(completions.ids), base.eos_ids).any(-1).reshape(-1, times)
    right = (texts == np.array([[row["answer"]] for row in part])) & ended
    return (ids, jnp.ones_like(ids), completions.ids, completions.mask), texts, right


_, texts, right = ask(tuned.params, train, 16, seed=1)
pairs, starts = [], []  # pairs of one question stand together, so that held-out pairs are of other questions
for row, answers, is_right in zip(train, texts, right, strict=True):
    starts.append(len(pairs))
    if is_right.any():
        wrong = sorted({str(answer) for answer, r in zip(answers, is_right, strict=True) if answer and not r})
        pairs += [
            {"prompt": row["prompt"], "chosen": row["answer"], "rejected": w} for w in wrong if w != row["answer"]
        ]
border = starts[len(train) * 9 // 10]
order = random.permutation(border)
pair_files = {
    "dataset": write("pairs.jsonl", [pairs[i] for i in order]),
    "eval_dataset": write("pairs_held_out.jsonl", pairs[border:]),
}
print(f"{right.mean():.2f} of the answers are right; {len(pairs)} pairs, such as {pairs[0]}")
judge = reward_model.Config(
    output_dir=str(folder / "reward"),
    model=models["SFT"],
    max_steps=250,
    learning_rate=1e-3,
    **pair_files,
    **quiet,
)
reward_path = run("reward model", reward_model, judge)
print(f"reward model: {figures['reward model']['eval_accuracy']:.2f} of held-out pairs right")

# %% [markdown]
# ## 4 GRPO against the reward model
#
# GRPO samples answers, lets the reward model grade them, and makes those better than the mean of their group likelier. (The
# tutorial says that GRPO needs no reward model. What it does not need is a critic, 价值网络; its rewards must come from
# somewhere, and the tutorial's own code calls a reward model. A task with a rule for right and wrong, as this one, could
# use the rule; here the rule only watches, with weight 0.)

# %%
online = grpo.Config(
    output_dir=str(folder / "grpo"),
    model=models["SFT"],
    dataset=write("prompts.jsonl", train),
    reward_funcs=(f"reward_model:{reward_path}", "jaxrl_llm.rewards:exact_match_tokens"),
    reward_weights=(1.0, 0.0),
    traceable_rewards=True,
    num_prompts=32,
    num_generations=8,
    max_completion_length=4,
    max_steps=50,
    beta=0.05,
    learning_rate=1e-3,
    eval_prompts=64,
    logging_steps=1,
    overwrite=True,
    warmup_steps=10,
    save_steps=10_000,
    eval_steps=1000,
)
models["GRPO"] = run("GRPO", grpo, online)

# %% [markdown]
# ## 5 DPO, beside it
#
# DPO learns from the same pairs without a reward model and without sampling. Its reward is implicit: how much likelier an
# answer has become than under the reference, the SFT model:
#
# $$ L_{\text{DPO}} = -\log \sigma\Big(\beta \Big[\log\frac{p_\theta(y_w)}{p_{\text{ref}}(y_w)}
#    - \log\frac{p_\theta(y_l)}{p_{\text{ref}}(y_l)}\Big]\Big) $$
#
# where $\log p(y)$ is the SUM over the tokens of the answer. (The tutorial takes the mean over prompt and answer, which
# is another loss. It also says that a larger $\beta$ lets the model move further: it is the pull to the reference, so a
# larger $\beta$ holds it closer. Notebook 08 measures it.)

# %%
log_probs = np.array([-2.0, -3.0, -2.5, -2.8])  # policy of chosen and rejected, then reference of both
dpo_hand = np.log1p(np.exp(-0.1 * ((log_probs[0] - log_probs[2]) - (log_probs[1] - log_probs[3]))))
dpo_library = float(dpo_loss(*(jnp.array([x]) for x in log_probs), beta=0.1)[0])
print(f"by hand {dpo_hand:.6f}, library {dpo_library:.6f}")
offline = dpo.Config(
    output_dir=str(folder / "dpo"),
    model=models["SFT"],
    max_steps=100,
    beta=0.1,
    learning_rate=3e-4,
    per_device_train_batch_size=32,
    **pair_files,
    **quiet,
)
models["DPO"] = run("DPO", dpo, offline)

# %% [markdown]
# ## What each stage moved
#
# Each model answers the 200 held-out sums sixteen times, by sampling. Beside the true score stand the reward model's
# grade and the KL divergence (KL 散度) to the SFT model: how far the model has gone, in nats an answer.

# %%
reward = load_token_reward(reward_path, base.tokenizer)
log_prob_sum = jax.jit(
    lambda params, text: jnp.where(
        text[3], score_completions(base.apply, base.head_kernel, params, *text).log_probs, 0
    ).sum(-1)
)
grade = jax.jit(lambda text: reward(*text))
scores = {}
for name, path in models.items():
    params = load(path).params
    text, _, is_right = ask(params, held_out, 16, seed=7)
    per_sum = is_right.mean(axis=1)
    scores[name] = {
        "right": per_sum.mean(),
        "standard error": per_sum.std(ddof=1) / len(per_sum) ** 0.5,
        "reward model": float(grade(text).mean()),
        "KL to SFT": float((log_prob_sum(params, text) - log_prob_sum(tuned.params, text)).mean()),
    }
for name, values in scores.items():
    print(f"{name:11}", {label: round(float(value), 3) for label, value in values.items()})

# %%
lines = [line for line in read_metrics(folder / "grpo") if "rewards/exact_match_tokens/mean" in line]
figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), dpi=80)
colors = ["0.7", "C0", "C2", "C3"]
errors = [2 * values["standard error"] for values in scores.values()]
axes[0].bar(list(scores), [values["right"] for values in scores.values()], yerr=errors, color=colors)
axes[0].set(ylabel="share right, sampled", title="200 held-out sums, ± 2 standard errors", ylim=(0, 1))
axes[1].bar(list(scores)[1:], [values["KL to SFT"] for values in list(scores.values())[1:]], color=colors[1:])
axes[1].set(ylabel="nats an answer", title="KL divergence to the SFT model")
axes[2].plot([line["rewards/exact_match_tokens/mean"] for line in lines], color="C2", label="right (true score)")
axes[2].set(xlabel="iteration of GRPO (256 answers)", ylabel="share right", title="training sums in GRPO")
other = axes[2].twinx()
other.plot([line["reward"] for line in lines], color="0.5", label="reward model's grade")
other.set(ylabel="reward model's grade")
axes[2].legend(loc="upper left")
other.legend(loc="lower right")
plt.tight_layout()
plt.show()

# %% [markdown]
# - Pretraining gave the sums, and no answers: the model writes on and never ends, so its score is nought.
# - SFT gave the form. The score is that of a careless copyist, for the book is what it knows.
# - GRPO did what it was told: the reward model's grade rises by about a point. The true score does not follow. The
#   reward model orders four of five pairs rightly, and the grade is won on the answers about which it errs. This is
#   reward hacking (奖励作弊), and the reason why pipelines hold the KL, stop early, and measure something that nothing
#   was trained on.
# - DPO, from the same pairs, stays closer to the SFT model and gains less grade; its true score is about that of SFT.
#
# Where right and wrong can be checked, give GRPO the check itself. With the rule as its reward GRPO takes a model on sums
# with plus and minus from 0.543 to 0.824 of held-out sums (mean of 5 seeds, `python -m benchmarks.online_methods
# compare`). Where they cannot be checked, as with film reviews, the pipeline is `python -m benchmarks.rlhf`, with a
# sentiment lexicon as the measure that nothing was trained on.
#
# One seed: what is asserted below are the large gaps.

# %%
assert abs(hand - library) < 1e-6
assert abs(dpo_hand - dpo_library) < 1e-6
right = {name: values["right"] for name, values in scores.items()}
assert right["pretrained"] < 0.05  # it knows sums, and does not answer
assert right["SFT"] > right["pretrained"] + 0.1  # the form of an answer
assert figures["reward model"]["eval_accuracy"] > 0.6  # the reward model tells right from wrong, better than chance
grades = {name: values["reward model"] for name, values in scores.items()}
assert grades["GRPO"] > grades["SFT"] + 0.5  # GRPO raises what it is given to raise ...
assert right["GRPO"] < right["SFT"] + 0.1  # ... and the true score does not follow
assert grades["DPO"] > grades["SFT"] + 0.1  # DPO raises the same grade without ever seeing the reward model
assert scores["DPO"]["KL to SFT"] < scores["GRPO"]["KL to SFT"]  # and goes less far
