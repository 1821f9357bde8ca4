"""What fine-tuning needs in memory: all parameters, LoRA and QLoRA, with SFT, DPO, GRPO and PPO; nothing is allocated.

    python -m benchmarks.memory                       # GPT-2 124M, and a Llama of 7B parameters

The programs are the recipes' own, compiled from shapes for this machine's backend, on a CPU without the float32 copy of frozen
bfloat16 kernels that it alone needs (`outlines.CPU_PLAN`). Settings are the recipes'
defaults: GRPO without a reference, PPO with one and, training all parameters, with a value network of its own.
Beside them stand the bytes of weights, optimizer and gradients by arithmetic, and what the tutorial claims.
"""

from typing import Any

from jaxrl_llm import xla_cpu

xla_cpu.set_flag()

import jax

from benchmarks.results import record
from jaxrl_llm.data import character_tokenizer
from jaxrl_llm.models import GPT2, Decoder, GPT2Config, Llama, LlamaConfig
from jaxrl_llm.recipes.text.estimate import GB, Config, Way, bytes_of, need_of, settings_of
from jaxrl_llm.recipes.text.language_model import outline_of_module
from jaxrl_llm.recipes.text.outlines import outline_run

LENGTHS = {"max_prompt_length": 256, "max_completion_length": 256}
LLAMA = LlamaConfig(
    max_position_embeddings=4096, dtype="bfloat16", remat=True
)  # the other sizes are those of Llama 2 7B
MODELS: dict[str, tuple[Decoder, dict[str, Any]]] = {
    "gpt2": (GPT2(GPT2Config()), {}),
    "llama-7b": (Llama(LLAMA), {"model_type": "llama", "dtype": "bfloat16", "remat": True}),
}
BATCHES: dict[str, dict[str, int]] = {
    "sft": {"batch_size": 1},
    "dpo": {"batch_size": 1},
    "grpo": {"batch_size": 8, "gradient_accumulation_steps": 8},
    "ppo": {"batch_size": 8, "gradient_accumulation_steps": 8},
}
WAYS = (Way(0), Way(8), Way(8, quantized=True))
CLAIMS = {"all parameters": 28.0, "LoRA r 8": 12.0, "QLoRA r 8": 4.0}
"""Gigabytes that the tutorial gives for 7B parameters, whatever the method."""
CLAIMED_SAVING = 0.5
"""Share of PPO's memory that, it says, GRPO does without."""


def needs(model: str, recipe: Any, way: Way) -> dict[str, Any]:
    """Estimates one run in gigabytes, and adds what arithmetic says: gradients are as large as what is trained, in float32."""
    module, options = MODELS[model]
    settings = settings_of(Config(recipe=recipe, **LENGTHS, **options, **BATCHES[recipe]), way)
    run = outline_run(outline_of_module(module, character_tokenizer("ab"), settings), settings)
    found = need_of(run)
    held = {name: getattr(found, name) / GB for name in ("parameters", "optimizer", "reference", "temporary", "peak")}
    gradients = bytes_of(run.trained) / GB
    counted = sum(held[name] for name in ("parameters", "optimizer", "reference")) + gradients
    plain = {"gradients": gradients, "weights_optimizer_reference_gradients": counted}
    return {"trained_parameters": found.trained_parameters, "peak_in": found.program, **held, **plain}


def verdicts(figures: dict[str, Any]) -> dict[str, str]:
    """Compares the figures of 7B with the tutorial's claims: counted (without activations), and of the program."""
    said = {}
    for way, claim in CLAIMS.items():
        sft = figures["llama-7b"]["sft"][way]
        counted, peak = sft["weights_optimizer_reference_gradients"], sft["peak"]
        right = "holds" if abs(counted - claim) <= 0.25 * claim else f"is {counted / claim:.1f} times that"
        said[f"7B, {way}: {claim:g} GB"] = (
            f"SFT without activations takes {counted:.1f} GB, which {right}; peak {peak:.1f}"
        )
    for model, recipes in figures.items():
        for way in CLAIMS:
            saving = 1 - recipes["grpo"][way]["peak"] / recipes["ppo"][way]["peak"]
            right = "holds" if abs(saving - CLAIMED_SAVING) <= 0.1 else "does not hold"
            said[f"{model}, {way}: GRPO needs 50 % less than PPO"] = f"{100 * saving:.0f} % less: {right}"
    return said


def main() -> None:
    """Estimates every run and records the figures."""
    figures: dict[str, Any] = {}
    for model in MODELS:
        figures[model] = {}
        for recipe in BATCHES:
            figures[model][recipe] = {}
            for way in WAYS:
                figures[model][recipe][way.label] = needs(model, recipe, way)
                print(model, recipe, way.label, figures[model][recipe][way.label], flush=True)
    told = verdicts(figures)
    backend = {"backend": jax.default_backend()}
    print(record("memory", backend | {"gigabytes": figures, "verdicts": told}, packages=("flax", "optax")), told)


if __name__ == "__main__":
    main()
