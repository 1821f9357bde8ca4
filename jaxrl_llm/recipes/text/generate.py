r"""Complete prompts with a saved model.

    jaxrl-llm generate --model runs/sft/model --prompt "Define: happiness\n"
    jaxrl-llm generate --model my/gpt2 --prompt "Once upon a time" --num-generations 3 --temperature 0.8

A backslash followed by n in a prompt is read as a line break, which shells make hard to type.
"""

import dataclasses

import jax
import numpy as np
from rich.console import Console
from rich.text import Text

from jaxrl_llm.data import tokenize_prompt
from jaxrl_llm.data.formats import Instruction
from jaxrl_llm.recipes.options import ModelOptions, require, require_at_least
from jaxrl_llm.recipes.text.language_model import complete, load_model, require_room


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of generation."""

    model: str
    """Folder or hub id of the model."""
    adapter: str = ""
    """Folder of adapters in PEFT's format that are merged into it."""
    prompt: tuple[str, ...]
    """One or more prompts, taken as they stand."""
    instruction: bool = False
    """Put each prompt into the template of instructions, or the chat template of the tokenizer."""
    max_new_tokens: int = 64
    """Longest completion, in tokens; fewer where the model has no room for them."""
    num_generations: int = 1
    """Completions of each prompt."""
    temperature: float = 0.0
    """0 takes the most likely token each time; 1 samples from the model's distribution."""
    top_p: float = 1.0
    """Sample from the most likely tokens that together have probability p."""
    seed: int = 0
    """Seed of the sampling."""


def run(config: Config) -> list[str]:
    """Prints and returns the completions, those of one prompt together.

    Raises:
        ValueError: If a setting is wrong or the model cannot be loaded.
    """
    require_at_least(1, max_new_tokens=config.max_new_tokens, num_generations=config.num_generations)
    require("temperature", config.temperature, "at least 0", lambda t: t >= 0)
    require("top_p", config.top_p, "in (0, 1]", lambda p: 0 < p <= 1)
    require_at_least(0, seed=config.seed)
    require("prompt", config.prompt, "at least one text, none of them empty", lambda p: p and all(p))
    key = jax.random.key(config.seed)
    model = load_model(ModelOptions(model=config.model, adapter=config.adapter), key)
    texts = [text.replace("\\n", "\n") for text in config.prompt]
    prompts = [Instruction(text) if config.instruction else text for text in texts]
    tokens = [tokenize_prompt(prompt, model.tokenizer) for prompt in prompts]
    longest = max(map(len, tokens))
    require_room(model, longest, "shorten the prompt")
    completions = complete(
        model,
        model.params,
        [np.asarray(ids) for ids in tokens for _ in range(config.num_generations)],
        key,
        max_new_tokens=min(config.max_new_tokens, model.context_length - longest + 1),
        temperature=config.temperature,
        top_p=config.top_p,
    )
    console = Console()
    for index, completion in enumerate(completions):
        prompt = Text(texts[index // config.num_generations], style="dim")
        console.print(prompt + Text(completion, style="bold"), soft_wrap=True)
    return completions
