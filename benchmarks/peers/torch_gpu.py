"""GPT-2 of transformers on a GPU, torch.compile and flash attention in bfloat16: SIZE ROWS LENGTH."""

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import timing
from benchmarks.gpt2_speed import SIZES

size, rows, length = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
torch.set_float32_matmul_precision("high")
model = GPT2LMHeadModel(GPT2Config(**SIZES[size], **dropout), attn_implementation="sdpa").cuda()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
ids = torch.randint(0, 50_000, (rows, length), device="cuda")
forward = torch.compile(model)


def step() -> None:
    """Takes one step and waits for it."""
    with torch.autocast("cuda", torch.bfloat16):
        loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    torch.cuda.synchronize()


step()
timing.report(step, repeats=10, packages=("torch", "transformers"))
