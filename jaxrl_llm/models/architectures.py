"""The architectures that there are: the one table that loading and saving go by."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxrl_llm.models import gpt2_checkpoint, llama_checkpoint
from jaxrl_llm.models.checkpoint import Layout
from jaxrl_llm.models.decoder import Decoder
from jaxrl_llm.models.gpt2 import GPT2
from jaxrl_llm.models.llama import Llama


class Architecture(NamedTuple):
    """An architecture, and the way from and to its checkpoints.

    Attributes:
        name: With what transformers begins the names of its classes.
        language_model: With what it ends that of the language model.
        module: Our class.
        config_from_json: Reads the contents of config.json.
        config_to_json: Writes them.
        layout: The names of its tensors.
    """

    name: str
    language_model: str
    module: type[Decoder]
    config_from_json: Callable[[Mapping[str, Any]], Any]
    config_to_json: Callable[[Any], dict[str, Any]]
    layout: Layout


def _llama(name: str) -> Architecture:
    read, write = llama_checkpoint.config_from_json, llama_checkpoint.config_to_json
    return Architecture(name, "ForCausalLM", Llama, read, write, llama_checkpoint.LAYOUT)


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture(
        "GPT2",
        "LMHeadModel",
        GPT2,
        gpt2_checkpoint.config_from_json,
        gpt2_checkpoint.config_to_json,
        gpt2_checkpoint.LAYOUT,
    ),
    "llama": _llama("Llama"),
    "mistral": _llama("Mistral"),
    "qwen2": _llama("Qwen2"),
    "qwen3": _llama("Qwen3"),
}
"""What can be loaded, by the `model_type` of config.json."""

SCALAR_HEAD = "ForSequenceClassification"
"""With what transformers ends the name of a decoder with a scalar head."""
