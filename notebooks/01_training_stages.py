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
# # 01 The stages of training 训练的三个阶段
#
# A language model goes to school three times. In pretraining (预训练) it reads a library, and learns how text goes on. In
# supervised fine-tuning (SFT, 监督微调) a teacher shows it questions with good answers, and it learns to answer and to
# stop. In reinforcement learning from human feedback (RLHF, 基于人类反馈的强化学习) it answers by itself, a reader says
# which answers are liked, and it learns to please the reader.
#
# Here a GPT-2 of 136,960 parameters goes through all three, on real English: WordNet's definitions of 5,000 words. After
# each stage we measure three things, one for each stage, and look at what the model writes.

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

from jaxrl_llm.advantages import group_relative_advantages
from jaxrl_llm.data import collate_prompts, split_indices, tokenize_prompt, wordnet_definitions
from jaxrl_llm.losses import cross_entropy_loss, grpo_loss
from jaxrl_llm.optimizers import make_optimizer, make_schedule
from jaxrl_llm.recipes.options import ModelOptions
from jaxrl_llm.recipes.text import pretrain, sft
from jaxrl_llm.recipes.text.language_model import decode, load_model
from jaxrl_llm.rollouts import generate, score_completions, score_tokens
from jaxrl_llm.training import init_train_state, make_train_step

rows = wordnet_definitions()
train, held_out = ([rows[i] for i in part] for part in split_indices(len(rows), held_out=256, seed=0))
word = lambda row: row["prompt"].removeprefix("Define: ").strip()  # noqa: E731
folder = Path(tempfile.mkdtemp())


def write(name, lines):
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return str(folder / name)


def as_raw_text(part):
    return [{"text": "".join(f"{word(row)}: {row['completion']}\n" for row in part)}]


print(rows[1000])
print(as_raw_text(rows[1000:1002])[0]["text"])

# %% [markdown]
# ## Stage 1: pretraining
#
# The raw text is a plain dictionary, `word: definition`, line after line, with no end. The loss is the cross entropy
# (交叉熵) of every next token:
#
# $$ L_{\text{pretrain}} = -\frac1T \sum_t \log p_\theta(x_t \mid x_{<t}) $$
#
# that is `cross_entropy_loss` with a mask of ones. The recipe cuts the text into windows and trains; its result is in
# bits per byte (每字节比特数), which do not depend on the tokenizer.

# %%
small = {"overwrite": True, "num_samples": 0, "lr_scheduler_type": "linear", "warmup_steps": 20, "save_steps": 10_000}
size = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 64, "initializer_range": 0.1}
pretraining = pretrain.Config(
    output_dir=str(folder / "pretrain"),
    dataset=write("raw.jsonl", as_raw_text(train)),
    eval_dataset=write("raw_held_out.jsonl", as_raw_text(held_out)),
    tokenizer="bpe:512",
    max_length=63,
    max_steps=200,
    per_device_train_batch_size=16,
    learning_rate=5e-3,
    eval_steps=40,
    **size,
    **small,
)
with capture_output():  # the recipes print tables of their progress
    pretrained_figures = pretrain.run(pretraining)
base = load_model(ModelOptions(model=pretrained_figures["model"]), jax.random.key(0))
print(f"{base.num_params:,} parameters, {pretrained_figures['eval_bits_per_byte']:.2f} bits per byte of held-out text")

# %% [markdown]
# ## Stage 2: supervised fine-tuning
#
# Now each row is a question, `Define: word`, with its answer. The loss is the same, but the mask (掩码) $m$ is one on the
# answer and its end-of-text token, and zero on the question:
#
# $$ L_{\text{SFT}} = -\frac{\sum_t m_t \log p_\theta(x_t \mid x_{<t})}{\sum_t m_t} $$

# %%
tuning = sft.Config(
    output_dir=str(folder / "sft"),
    model=pretrained_figures["model"],
    dataset=write("sft.jsonl", train),
    eval_dataset=write("sft_held_out.jsonl", held_out),
    max_length=63,
    max_steps=120,
    per_device_train_batch_size=16,
    learning_rate=3e-3,
    eval_steps=40,
    **small,
)
with capture_output():
    tuned_figures = sft.run(tuning)
tuned = load_model(ModelOptions(model=tuned_figures["model"]), jax.random.key(0))

# %% [markdown]
# ## Stage 3: reinforcement learning from what a reader likes
#
# Nobody wrote down the answers that the reader wants. There is a reward (奖励) $r$ for each finished answer, and the model
# must find out by trying. This reader likes short definitions: 1 for an answer that ends within ten tokens, else 0. (A
# rule stands here for the human. Notebook 10 learns a reward model, 奖励模型, from pairs of answers.)
#
# GRPO, the simplest method, lets the model answer each question eight times, compares the answers with one another, and
# makes the better ones likelier: the advantage (优势) of an answer is its reward less the mean of its group, divided by
# the group's standard deviation. A penalty on the KL divergence (KL 散度) keeps the model close to where it began.
#
# $$ A_i = \frac{r_i - \operatorname{mean}(r)}{\operatorname{std}(r) + \epsilon}, \qquad
#    L = -\frac{1}{T} \sum_{i,t} \frac{p_\theta(x_{i,t})}{p_{\text{old}}(x_{i,t})} A_i
#    + \beta\, \mathrm{KL}(p_\theta \| p_{\text{SFT}}) $$
#
# Two functions are these equations, `group_relative_advantages` and `grpo_loss` (which also clips the ratio). With one
# update for each batch the ratio is 1 and only its gradient counts.

# %%
GROUP, QUESTIONS, LENGTH, LIMIT = 8, 8, 40, 10
eos = base.tokenizer.eos_token_id
hand = np.array([1.0, 0, 0, 0])
advantages = group_relative_advantages(jnp.asarray(hand), 4)
print("rewards", hand, "-> advantages", np.asarray(advantages).round(3))


def reward(completions):
    return ((completions.mask.sum(-1) <= LIMIT) & (completions.ids == eos).any(-1)).astype(jnp.float32)


def pad_prompts(part):
    tokens = [tokenize_prompt(row["prompt"], base.tokenizer) for row in part]
    batch = collate_prompts(tokens, pad_id=eos, length=24)
    return batch.prompt_ids, batch.prompt_mask


def rl_loss(params, batch, key):
    statistics = score_completions(tuned.apply, tuned.head_kernel, params, *batch["text"])
    reference = score_completions(tuned.apply, tuned.head_kernel, tuned.params, *batch["text"])
    return grpo_loss(
        statistics.log_probs,
        batch["old_log_probs"],
        batch["advantages"],
        batch["text"][3],
        ref_log_probs=jax.lax.stop_gradient(reference.log_probs),
        beta=0.05,
    )


ITERATIONS = 40
optimizer = make_optimizer("adam", learning_rate=make_schedule(1e-3, warmup_steps=5), max_grad_norm=1.0)


@jax.jit
def grpo_step(state, key, ids, mask):
    completions = generate(
        tuned.apply, state.params, key, ids, mask, max_new_tokens=LENGTH, num_generations=GROUP, eos_id=eos, pad_id=eos
    )
    rewards = reward(completions)
    text = jnp.repeat(ids, GROUP, axis=0), jnp.repeat(mask, GROUP, axis=0), completions.ids, completions.mask
    batch = {
        "text": text,
        "old_log_probs": completions.log_probs,
        "advantages": group_relative_advantages(rewards, GROUP),
    }
    state, metrics = make_train_step(rl_loss, optimizer)(state, batch, key)
    return state, metrics | {"reward": rewards.mean(), "length": completions.mask.sum(-1).mean()}


prompt_ids, prompt_mask = pad_prompts(train)
state, order, history = init_train_state(tuned.params, optimizer), np.random.default_rng(0), []
for index in range(ITERATIONS):
    chosen = order.integers(0, len(prompt_ids), QUESTIONS)
    state, metrics = grpo_step(state, jax.random.key(index), prompt_ids[chosen], prompt_mask[chosen])
    history.append((float(metrics["reward"]), float(metrics["length"])))

# %% [markdown]
# ## What each stage taught
#
# Each model now reads the held-out raw text, and answers 256 held-out questions by sampling (采样).

# %%
text = as_raw_text(held_out)[0]["text"]
windows = pretrain.load_windows(pretraining, [text], base.tokenizer)
raw = jnp.asarray(np.stack([window.ids for window in windows[:-1]]))  # the last window is shorter
num_bytes = len(text.encode()) * raw[:, 1:].size / sum(len(window.ids) - 1 for window in windows)
held_out_ids, held_out_mask = pad_prompts(held_out)


@jax.jit
def raw_nats(params):
    statistics = score_tokens(base.apply, base.head_kernel, params, raw, jnp.ones_like(raw))
    return cross_entropy_loss(statistics.log_probs, jnp.ones_like(raw[:, 1:]))[0] * raw[:, 1:].size


answer = jax.jit(partial(generate, base.apply, max_new_tokens=LENGTH, eos_id=eos, pad_id=eos))
untrained = jax.jit(base.module.init)(jax.random.key(1), raw[:1, :8])["params"]
models = {"untrained": untrained, "pretrained": base.params, "SFT": tuned.params, "RL": state.params}
measured, written = {}, {}
for name, params in models.items():
    completions = answer(params, jax.random.key(9), held_out_ids, held_out_mask)
    measured[name] = {
        "bits per byte of raw text": float(raw_nats(params)) / num_bytes / np.log(2),
        "share of answers that end": float((completions.ids == eos).any(-1).mean()),
        "reader's reward": float(reward(completions).mean()),
    }
    written[name] = decode(base.tokenizer, completions.ids[:3], completions.mask[:3])
for name, values in measured.items():
    print(f"{name:11}", {label: round(value, 2) for label, value in values.items()})
for name, texts in written.items():
    print(f"\n{name}")
    for row, text in zip(held_out, texts, strict=False):
        print(f"   {row['prompt'].strip()} -> {text!r}")

# %%
figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), dpi=80)
for axis, label in zip(axes, measured["SFT"], strict=False):
    axis.bar(list(measured), [values[label] for values in measured.values()], color=["0.7", "C0", "C1", "C2"])
    axis.set(title=label, ylabel="bits a byte" if "bits" in label else "share of answers")
    axis.tick_params(axis="x", rotation=30)
axes[3].plot([reward for reward, _ in history], color="C2")
axes[3].set(title="stage 3, sampled answers", xlabel="iteration (64 answers)", ylabel="mean reward")
plt.tight_layout()
plt.show()

# %% [markdown]
# - Pretraining gives the language: the bits per byte fall. Asked a question, the model goes on as a dictionary does, line
#   after line, and never stops: its book had no end.
# - SFT gives the form: the answers end. For this the model forgets (遗忘) a little of the book.
# - Reinforcement learning gives what the reader likes, exactly that: all answers are short, though nobody wrote one. Good
#   they are not, for the reader did not ask for it. Words break off, and the raw text is predicted worse than before: the
#   KL penalty slows this drift, and does not stop it. A reward says all that a model is going to care about.
#
# The definitions are no knowledge: a model of this size learns what a definition sounds like. In bigger models it is the
# same three lessons. The pipeline on film reviews, with a learned reward and more measures, is
# `python -m benchmarks.rlhf`; notebook 10 has all stages on a task with right answers.
#
# (The tutorial credits GRPO to the DeepSeek-V3 report. It is from DeepSeekMath, arXiv 2402.03300, whose advantage divides
# by the group's deviation as above; `scale_rewards="none"` leaves that out, as the tutorial does.)

# %%
assert np.allclose(advantages, (hand - hand.mean()) / (hand.std(ddof=1) + 1e-4), atol=1e-5)
bits, ended, liked = (np.array([values[label] for values in measured.values()]) for label in measured["SFT"])
assert bits[1] < bits[0] - 0.8  # pretraining: the language
assert ended[1] < 0.05  # ... not the form
assert ended[2] > 0.5  # SFT: the form
assert liked[3] > liked[2] + 0.15  # RL: what the reader likes
assert bits[3] > bits[2] + 0.1  # ... and what it costs
