"""GPT-2 of transformers in PyTorch: train|generate SIZE [--compile]."""

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import timing
from benchmarks.gpt2_speed import BATCH, LENGTH, NEW, PROMPT, ROWS, SIZES

task, size = sys.argv[1:3]
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(**SIZES[size], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
PACKAGES = ("torch", "transformers")
if task == "train":
    ids = torch.randint(0, 50_000, (ROWS[size], LENGTH[size]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, foreach=True)
    forward = torch.compile(model) if "--compile" in sys.argv else model

    def step() -> None:
        forward(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    timing.report(step, packages=PACKAGES)
else:
    model.eval()
    prompts = torch.randint(0, 50_000, (BATCH, PROMPT))
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": True, "top_k": 0, "pad_token_id": 50256}
    with torch.no_grad():
        timing.report(
            lambda: model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings), packages=PACKAGES
        )
