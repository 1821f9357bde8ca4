"""Makes tests/golden/gpt2_*: small random GPT-2s, saved by transformers, with the numbers that torch computes for them.

Run it where torch and transformers are installed (the `parity` extra): `python tests/golden/make_gpt2_goldens.py`.
Each folder has config.json and model.safetensors as transformers writes them, and golden.npz with `tokens` and `mask`
[batch, time] (left-padded), `logits` [batch, time, vocab] and `greedy` [batch, new tokens] (no end of sequence).
"""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers

CASES = {
    "gpt2_tied": {"vocab_size": 61, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "gpt2_untied": {
        "vocab_size": 47,
        "n_positions": 24,
        "n_embd": 24,
        "n_layer": 3,
        "n_head": 3,
        "n_inner": 40,
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-3,
        "tie_word_embeddings": False,
    },
    "gpt2_shallow": {
        "vocab_size": 33,
        "n_positions": 20,
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 8,
        "activation_function": "relu",
    },
}
PROMPT_LENGTHS, NEW_TOKENS = (10, 7, 3), 8


def random_model(settings: dict) -> transformers.GPT2LMHeadModel:
    """Makes a model in which every parameter matters: biases and norms are random too, and weights are not small."""
    config = transformers.GPT2Config(**settings, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0, 0.3)
    return model


def main() -> None:
    torch.manual_seed(0)
    for name, settings in CASES.items():
        folder = Path(__file__).parent / name
        model = random_model(settings)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink()
        tokens = torch.randint(settings["vocab_size"], (len(PROMPT_LENGTHS), max(PROMPT_LENGTHS)), dtype=torch.int32)
        mask = (torch.arange(tokens.shape[1]) >= tokens.shape[1] - torch.tensor(PROMPT_LENGTHS)[:, None]).long()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(tokens, attention_mask=mask, position_ids=positions).logits
            greedy = model.generate(
                tokens, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0
            )
        arrays = {"tokens": tokens, "mask": mask.bool(), "logits": logits, "greedy": greedy[:, tokens.shape[1] :].int()}
        np.savez_compressed(folder / "golden.npz", **{key: value.numpy() for key, value in arrays.items()})


if __name__ == "__main__":
    main()
