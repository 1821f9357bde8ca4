"""Makes tests/golden/{llama2,llama3,smollm2,qwen2,qwen3}: small random models, saved by transformers.

Run it where torch and transformers are installed (the `parity` extra): `python tests/golden/make_llama_goldens.py`.
Each folder is like those of `make_gpt2_goldens.py`. `llama_reward` and `gpt2_reward` are classifiers with one label; their
golden.npz has `scores` [batch] instead of logits.
"""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import transformers

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_theta": 500.0,
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES = {
    "llama2": ("llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-3}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "smollm2": (
        "llama",
        {
            "tie_word_embeddings": True,
            "hidden_size": 24,
            "num_attention_heads": 6,
            "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"},
        },
    ),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 6, "num_hidden_layers": 3}),
}
REWARD_MODELS = {
    "llama_reward": ("llama", SMALL),
    "gpt2_reward": ("gpt2", {"vocab_size": 61, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}),
}
PROMPT_LENGTHS, NEW_TOKENS = (20, 11, 3), 8


def randomized(model):
    """Makes every parameter matter: biases and norms are random too, and weights are not small."""
    with torch.no_grad():
        for name, parameter in model.eval().named_parameters():
            is_norm = "norm" in name or ".ln_" in name
            parameter.normal_(1.0 if is_norm and name.endswith("weight") else 0.0, 0.3)
    return model


def config_of(model_type: str, settings: dict, **tokens: int | None) -> transformers.PreTrainedConfig:
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | tokens
    return transformers.AutoConfig.for_model(model_type, **settings, **tokens)


def inputs(vocab_size: int) -> dict[str, torch.Tensor]:
    """Left-padded rows with the positions of their real tokens."""
    tokens = torch.randint(1, vocab_size, (len(PROMPT_LENGTHS), max(PROMPT_LENGTHS)), dtype=torch.int32)
    mask = (torch.arange(tokens.shape[1]) >= tokens.shape[1] - torch.tensor(PROMPT_LENGTHS)[:, None]).int()
    tokens *= mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}


def save(folder: Path, model, batch: dict[str, torch.Tensor], **numbers: torch.Tensor) -> None:
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    arrays = {"tokens": batch["input_ids"], "mask": batch["attention_mask"].bool(), **numbers}
    np.savez_compressed(folder / "golden.npz", **{key: value.numpy() for key, value in arrays.items()})


def main() -> None:
    torch.manual_seed(0)
    here = Path(__file__).parent
    for name, (model_type, settings) in CASES.items():
        config = config_of(model_type, SMALL | settings)
        model = randomized(transformers.AutoModelForCausalLM.from_config(config))
        batch = inputs(SMALL["vocab_size"])
        with torch.no_grad():
            logits = model(**batch).logits
            del batch["position_ids"]  # generate counts them itself
            greedy = model.generate(**batch, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
        save(here / name, model, batch, logits=logits, greedy=greedy[:, -NEW_TOKENS:].int())
    for name, (model_type, settings) in REWARD_MODELS.items():
        config = config_of(model_type, settings, pad_token_id=0)
        config.num_labels = 1
        model = randomized(transformers.AutoModelForSequenceClassification.from_config(config))
        batch = inputs(settings["vocab_size"])
        with torch.no_grad():
            save(here / name, model, batch, scores=model(**batch).logits[:, 0])


if __name__ == "__main__":
    main()
