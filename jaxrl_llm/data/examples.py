"""What a row of each kind means: the one shape that all formats of a kind are read into (`jaxrl_llm.data.formats`)."""

import dataclasses
from typing import Any, NamedTuple, TypeAlias


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    """"system", "user" or "assistant"."""
    content: str


@dataclasses.dataclass(frozen=True)
class Instruction:
    """The prompt of an instruction row (no tuple, so that a tuple is always a conversation)."""

    instruction: str
    input: str = ""


Messages: TypeAlias = tuple[Message, ...]
Prompt: TypeAlias = str | Instruction | Messages
"""What the model is given: verbatim text, an instruction, or a conversation (may be empty before a `messages` row)."""
Completion: TypeAlias = str | Messages
"""What the model shall say: text after a text or an instruction, messages after messages."""


class SupervisedExample(NamedTuple):
    """A row of SFT. The loss falls on the completion; of messages, on those of the assistant."""

    prompt: Prompt
    completion: Completion


class PreferenceExample(NamedTuple):
    """A row of DPO or of a reward model. After messages, both answers are one message of the assistant each."""

    prompt: Prompt
    chosen: Completion
    rejected: Completion
    margin: float | None = None
    """By how much `chosen` is better, in units of the reward; None if the row does not say."""


class UnpairedExample(NamedTuple):
    """A row of KTO or BCO: one answer. After messages, it is one message of the assistant."""

    prompt: Prompt
    completion: Completion
    label: bool
    """Whether the answer is wanted."""


class RatedExample(NamedTuple):
    """A row of a pointwise reward model: a text, or an answer to a prompt, with its rating."""

    prompt: Prompt
    """"" for a text alone."""
    completion: Completion
    score: float
    """Finite; the higher the better."""


class PromptExample(NamedTuple):
    """A row of GRPO or PPO."""

    prompt: Prompt
    columns: dict[str, Any]
    """All other columns of the row: they go to the reward functions."""
