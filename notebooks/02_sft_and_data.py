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
# # 02 Supervised fine-tuning and its data 监督微调与数据
#
# A pretrained model has read much and goes on with any text. Supervised fine-tuning (SFT, 监督微调) shows it questions
# with good answers, like a teacher who lets a pupil copy model solutions. Two things decide what it learns: how a row of
# data becomes tokens, and on which of these tokens the loss falls.

# %%
from jaxrl_llm import xla_cpu

xla_cpu.set_flag()  # some releases of jaxlib miscompile on CPU without it; it must come before jax

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jaxrl_llm.data import (
    as_rows,
    batch_indices,
    character_tokenizer,
    collate_packed,
    collate_sft,
    load_tokenizer,
    one_digit_sums,
    pack_rows,
    preference_example,
    render_example,
    split_indices,
    supervised_example,
    tokenize_preference,
    tokenize_sft,
    tokenize_sft_rows,
    wordnet_definitions,
)
from jaxrl_llm.data.sums import ALPHABET
from jaxrl_llm.log_probs import token_log_probs
from jaxrl_llm.losses import cross_entropy_loss
from jaxrl_llm.models import (
    GPT2,
    GPT2Config,
    LoraConfig,
    adapt,
    head_kernel,
    join_trainable,
    merge_lora,
    split_trainable,
)
from jaxrl_llm.optimizers import make_optimizer, make_schedule
from jaxrl_llm.rollouts import score_tokens
from jaxrl_llm.training import init_train_state, make_train_step

# %% [markdown]
# ## Formats
#
# Rows come in four shapes. `supervised_example` reads the first three into one: a prompt (提示) and a completion (回答).
# Preference data (偏好数据) has two answers; DPO and reward models read them.

# %%
rows = as_rows(
    [
        {"instruction": "Add the numbers.", "input": "3 4", "output": "7"},
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello!"},
                {"role": "user", "content": "3+4?"},
                {"role": "assistant", "content": "7"},
            ]
        },
        {"text": "Seven is a prime number."},
    ]
)
gpt2 = load_tokenizer("gpt2")
for kind, row in zip(("instruction", "chat", "plain text"), rows, strict=True):
    print(kind)
    for segment in render_example(*supervised_example(row), gpt2):
        if segment.text:
            print("   ", "trained  " if segment.train else "read only", repr(segment.text))
pair = preference_example(as_rows([{"prompt": "3+4=", "chosen": "7", "rejected": "8"}])[0])
tokens = tokenize_preference(pair, gpt2)
print("preference\n    prompt", tokens.prompt_ids, " chosen", tokens.chosen_ids, " rejected", tokens.rejected_ids)

# %% [markdown]
# The template (模板) puts the marks around the texts; a tokenizer with a chat template (对话模板) of its own uses that
# instead. Each answer ends with EOS (结束符), `<|endoftext|>`, and EOS is trained: it is how the model learns to stop.
#
# The loss mask (损失掩码) says where the loss falls. In a chat these are all turns of the assistant.

# %%
chat = tokenize_sft(supervised_example(rows[1]), gpt2, max_length=64)
print("".join(f"[{gpt2.decode(i)}]" if t else gpt2.decode(i) for i, t in zip(chat.ids, chat.loss_mask, strict=True)))

# %% [markdown]
# In brackets: what is trained.
#
# ## Cross entropy by hand
#
# At each place the model gives a probability to every token. Cross entropy (交叉熵) is the surprise at the right one:
#
# $$ L = -\frac{\sum_t m_t \log p_\theta(y_t \mid y_{<t})}{\sum_t m_t}, \qquad
#    \log p(y) = z_y - \log \sum_v e^{z_v} $$
#
# with the mask $m$ and the logits $z$. `token_log_probs` is the right-hand equation, `cross_entropy_loss` the left-hand
# one. Two tokens that count and one of padding (填充), worked out in numpy:

# %%
logits = np.array([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [9.0, -9.0, 0.0]], np.float32)
targets, mask = np.array([0, 2, 1]), np.array([1, 1, 0])
surprise = [-(z[y] - np.log(np.exp(z).sum())) for z, y in zip(logits, targets, strict=True)]
hand = (surprise[0] + surprise[1]) / 2
loss, metrics = cross_entropy_loss(token_log_probs(jnp.asarray(logits), jnp.asarray(targets)), jnp.asarray(mask))
print(
    f"by hand {hand:.6f}, library {float(loss):.6f} nats a token; the padding's surprise {surprise[2]:.1f} is left out"
)

# %% [markdown]
# Two habits of sketches that the library does not have: `log(softmax(z))` is minus infinity as soon as a probability
# underflows, where log-softmax is a plain number; and a mean over each row first, then over rows, lets the token of a
# short answer count more than that of a long one.

# %%
far = jnp.array([0.0, 200.0])
naive, stable = float(jnp.log(jax.nn.softmax(far))[0]), float(token_log_probs(far, jnp.array(0)))
print("log(softmax):", naive, " token_log_probs:", stable)

# %% [markdown]
# ## Packing
#
# Rows have different lengths, and a batch (批) has one. Padding fills the gap and wastes work. Packing (打包) puts several
# rows into one, as segments that do not see one another: attention stays inside a segment, and positions begin anew. So
# the loss is the same.

# %%
examples = [supervised_example(row) for row in as_rows(wordnet_definitions()[:256])]
letters = character_tokenizer("".join(prompt + completion for prompt, completion in examples))
tokenized = tokenize_sft_rows(examples, letters, max_length=128).rows
packed = pack_rows(tokenized, 128)
padded_batch = collate_sft(tokenized, pad_id=letters.pad_token_id, length=128)
packed_batch = collate_packed(packed, pad_id=letters.pad_token_id, length=128)
waste = {}
for name, batch in (("padded", padded_batch), ("packed", packed_batch)):
    waste[name] = float(1 - batch.mask.mean())
    print(f"{name}: {len(batch.mask)} rows of 128, {100 * waste[name]:.0f} % of them padding")


tiny = GPT2(GPT2Config(vocab_size=len(letters), n_positions=128, n_embd=16, n_layer=1, n_head=2))
tiny_params = jax.jit(tiny.init)(jax.random.key(0), jnp.zeros((1, 8), int))["params"]


@jax.jit
def batch_loss(tokens, mask, loss_mask, segment_ids=None):
    statistics = score_tokens(tiny.apply, head_kernel, tiny_params, tokens, mask, segment_ids=segment_ids)
    return cross_entropy_loss(statistics.log_probs, loss_mask[:, 1:])[0]


apart, together = float(batch_loss(*padded_batch)), float(batch_loss(*packed_batch[:4]))
print(f"loss of the same 256 definitions: padded {apart:.6f}, packed {together:.6f} nats a token")

# %% [markdown]
# ## What the loss falls on, measured
#
# The tutorial that this library follows trains on every token of a row: on the prompt, and on the padding, whose id is
# that of EOS. The library masks both, and keeps the one EOS that ends the answer. Does it matter? Three copies of a new
# two-layer GPT-2 learn sums of three digits from the same rows in the same order. They differ in the mask alone.

# %%
sums = [supervised_example(row) for row in as_rows(one_digit_sums(operators="+"))]
digits = character_tokenizer(ALPHABET)
LENGTH = 12
sums_rows = tokenize_sft_rows(sums, digits, max_length=LENGTH).rows
sums_batch = collate_sft(sums_rows, pad_id=digits.eos_token_id, length=LENGTH)
train, held_out = split_indices(len(sums_rows), held_out=200, seed=0)
model = GPT2(
    GPT2Config(vocab_size=len(digits), n_positions=LENGTH, n_embd=48, n_layer=2, n_head=4, initializer_range=0.1)
)
MASKS = {
    "answer": sums_batch.loss_mask,
    "prompt + answer": sums_batch.mask,
    "prompt + answer + padding": np.ones_like(sums_batch.mask),
}
shares = {name: sums_batch.loss_mask.sum() / mask[:, 1:].sum() for name, mask in MASKS.items()}
print("share of the loss that falls on answers:", {name: round(float(share), 2) for name, share in shares.items()})


def sum_loss(params, batch, key):
    tokens, mask, loss_mask = batch
    statistics = score_tokens(model.apply, head_kernel, params, tokens, mask)
    return cross_entropy_loss(statistics.log_probs, loss_mask[:, 1:], statistics=statistics)


@jax.jit
def measure(params, batch):
    """Cross entropy of the answers, and the share of rows whose answer greedy decoding gets right, with its EOS."""
    tokens, mask, loss_mask = batch
    statistics = score_tokens(model.apply, head_kernel, params, tokens, mask)
    right = jnp.where(loss_mask[:, 1:], statistics.is_argmax, True).all(axis=1).mean()
    return cross_entropy_loss(statistics.log_probs, loss_mask[:, 1:])[0], right


STEPS, BATCH, SEEDS = 200, 32, (0, 1)
lanes = [(name, seed) for name in MASKS for seed in SEEDS]
schedule = make_schedule(3e-3, warmup_steps=20, lr_scheduler_type="linear", total_steps=STEPS)
optimizer = make_optimizer("adamw", learning_rate=schedule, max_grad_norm=1.0)
step = jax.jit(make_train_step(sum_loss, optimizer), donate_argnums=0)


@jax.jit
def init(seed):
    return init_train_state(model.init(jax.random.key(seed), jnp.zeros((1, 8), int))["params"], optimizer)


test = tuple(jnp.asarray(x[held_out]) for x in sums_batch)
AT = np.arange(20, STEPS + 1, 20)
reported, answers, right, trained = (np.zeros((3, 2, len(AT))), np.zeros((3, 2, len(AT))), np.zeros((3, 2)), {})
for i, (name, mask) in enumerate(MASKS.items()):
    for j, seed in enumerate(SEEDS):
        state = init(seed)
        for index in range(STEPS):
            chosen = train[batch_indices(len(train), BATCH, seed=seed, step=index)]
            batch = sums_batch.tokens[chosen], sums_batch.mask[chosen], mask[chosen]
            state, metrics = step(state, batch, jax.random.key(0))
            if index + 1 in AT:
                at = index // 20
                reported[i, j, at] = metrics["loss"]
                answers[i, j, at], right[i, j] = measure(state.params, test)
        trained[name, seed] = state.params

# %%
figure, (left, middle) = plt.subplots(1, 2, figsize=(11, 3.6), dpi=80)
for i, name in enumerate(MASKS):
    left.plot(AT, reported[i].mean(axis=0), label=name)
    middle.plot(AT, answers[i].mean(axis=0), label=name)
left.set(xlabel="step", ylabel="nats a token", title="training loss, as each run reports it")
middle.set(xlabel="step", ylabel="nats a token", title="cross entropy of held-out answers")
left.legend(title="loss on", fontsize=8)
plt.tight_layout()
plt.show()
for i, name in enumerate(MASKS):
    print(
        f"{name:26} reported {reported[i, :, -1].round(2)}, answers {answers[i, :, -1].round(2)}, right {right[i].round(2)}"
    )

# %% [markdown]
# Trained on answers alone, the model gets more held-out sums right, with either seed. The digits of a question are
# random: nothing can be learned of them, and their part of the gradient is noise. Padding misleads in another way. It is
# predicted at once, so the reported loss comes out lower than without it, and the answers are no better for it: losses
# over different tokens cannot be compared.
#
# The padding here has the id of EOS, as in GPT-2, which has no padding token. Whoever masks by id then masks the true EOS
# too, and the model never learns to stop. The library's masks travel beside the ids and are never read off them.
#
# (The prompts of real instruction data are text from which something can be learned. `completion_only_loss=False`
# trains on them.)
#
# ## All parameters or LoRA
#
# LoRA (低秩适配) leaves the kernel $W$ as it is, and trains a thin detour beside it:
#
# $$ y = x W + \frac{\alpha}{r}\, x A B, \qquad A: d_{in} \times r, \quad B: r \times d_{out} $$
#
# where $B$ is zero at the start. It is like notes on slips of paper in a book: few words, and they can be taken out again.
# `adapt` puts the slips in, `split_trainable` parts what is trained from what is not, `merge_lora` prints them into the
# book.
#
# The model that can add now learns another way to answer: the last digit of the sum alone. It learns it with all
# parameters, with the tutorial's adapters (rank 8 on the fused projection of queries, keys and values), and with adapters
# on every layer. Adapters want a higher learning rate.

# %%
last_digit = [row | {"completion": row["completion"][-1]} for row in one_digit_sums(operators="+")]
new_rows = tokenize_sft_rows([supervised_example(row) for row in as_rows(last_digit)], digits, max_length=LENGTH).rows
new_batch = collate_sft(new_rows, pad_id=digits.pad_token_id, length=LENGTH)
new_test = tuple(jnp.asarray(x[held_out]) for x in new_batch)  # the same sums are held out
base = trained["answer", 0]


def fine_tune(params, rate, steps=120):
    trainable, frozen = split_trainable(params)  # all parameters are trainable where there are no adapters
    schedule = make_schedule(rate, warmup_steps=20, lr_scheduler_type="linear", total_steps=steps)
    optimizer = make_optimizer("adamw", learning_rate=schedule, max_grad_norm=1.0)
    tune = jax.jit(make_train_step(lambda p, b, key: sum_loss(join_trainable(p, frozen), b, key), optimizer))
    state = init_train_state(trainable, optimizer)
    for index in range(steps):
        chosen = train[batch_indices(len(train), BATCH, seed=0, step=index)]
        state, _ = tune(state, tuple(x[chosen] for x in new_batch), jax.random.key(0))
    return join_trainable(state.params, frozen), sum(leaf.size for leaf in jax.tree.leaves(trainable))


runs = {
    "all parameters": fine_tune(base, 1e-3),
    "LoRA r 8, qkv": fine_tune(adapt(jax.random.key(1), base, LoraConfig(r=8, lora_alpha=16)), 1e-2),
    "LoRA r 8, all layers": fine_tune(
        adapt(jax.random.key(1), base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")), 1e-2
    ),
}
before = [float(x) for x in measure(base, new_test)]
print(f"{'before':22} {'':8} {before[0]:.2f} nats a token, right {before[1]:.2f}")
after = {name: [float(x) for x in measure(params, new_test)] for name, (params, _) in runs.items()}
for name, (nats, share) in after.items():
    print(f"{name:22} {runs[name][1]:8,} {nats:.2f} nats a token, right {share:.2f}")

# %% [markdown]
# A fifth of the numbers, on every layer, learn most of the new habit in the same steps. On attention alone, the tutorial's
# choice, they learn far less of it here: what a digit becomes is decided in the other layers too. Which layers are adapted
# counts as much as the rank. (That LoRA is as good as training all is a statement about big models and small changes.)
#
# The base itself is untouched, and a merged model computes the same:

# %%
adapted = runs["LoRA r 8, all layers"][0]
untouched = jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), adapted.base, base))
merged_gap = abs(float(measure(merge_lora(adapted), new_test)[0]) - after["LoRA r 8, all layers"][0])
print("base unchanged:", untouched, " merged model's loss differs by", f"{merged_gap:.0e}")

# %% [markdown]
# ## What was shown

# %%
assert abs(float(loss) - hand) < 1e-6  # cross entropy by hand = the library's
assert np.isneginf(naive) and stable == -200.0  # noqa: PT018
assert chat.loss_mask.sum() == 5 and chat.ids[chat.loss_mask].tolist().count(gpt2.eos_token_id) == 2  # noqa: PT018
assert np.isclose(apart, together, rtol=1e-5)  # packing changes nothing ...
assert waste["packed"] < 0.1 < 0.3 < waste["padded"]  # ... but the waste
assert right[0].mean() > right[2].mean() + 0.05  # answers alone: more of them right than with prompt and padding
assert reported[2, :, -1].mean() < reported[1, :, -1].mean() - 0.1  # padding makes the reported loss look better
assert untouched
assert merged_gap < 1e-4
assert after["all parameters"][1] > before[1] + 0.2  # both learn the new habit,
assert after["LoRA r 8, all layers"][1] > before[1] + 0.15
assert after["LoRA r 8, qkv"][0] > after["LoRA r 8, all layers"][0] + 0.15  # adapters on attention alone far less
