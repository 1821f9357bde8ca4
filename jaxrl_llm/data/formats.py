"""Dataset formats: what a row of each kind must hold, and the one shape that each kind is read into.

| recipe | columns of a row |
|---|---|
| SFT | `instruction`, `output` and optionally `input` |
| SFT | `messages` or `conversations`: a list of `{"role", "content"}` or ShareGPT `{"from", "value"}` |
| SFT | `prompt` and `completion`: both strings, or both lists of messages |
| SFT | `text`: every token is trained |
| DPO | `prompt` (or `instruction`, `input`), `chosen` and `rejected`: all strings, or all lists of messages |
| DPO | `chosen` and `rejected` alone: conversations that differ in their last message |
| GRPO, PPO | `prompt` (or `instruction`, `input`): a string or messages; all other columns go to the rewards |

Strings are taken verbatim; instructions and messages go through a template (`jaxrl_llm.data.templates`). Where
`instruction` and another format meet in one row (Alpaca has a `text` too), it is instruction data. A bad row raises a
`ValueError` that says where it stands, which field is wrong, what came and what was expected.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from jaxrl_llm.data.rows import Row

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
"""Accepted names of roles (the last two are ShareGPT's), and what each is read as."""


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
    """A row of DPO. After messages, `chosen` and `rejected` are one message of the assistant each."""

    prompt: Prompt
    chosen: Completion
    rejected: Completion


class PromptExample(NamedTuple):
    """A row of GRPO or PPO."""

    prompt: Prompt
    columns: dict[str, Any]
    """All other columns of the row: they go to the reward functions."""


def supervised_example(row: Row) -> SupervisedExample:
    """Reads a row of SFT in any of its formats (table above).

    Raises:
        ValueError: If the row is in no format, or a field is missing, of a wrong type, blank, or has an unknown role.

    Example:
        >>> from jaxrl_llm.data.rows import Row
        >>> supervised_example(Row("a.jsonl, line 1", {"prompt": "3+4+5=", "completion": "12"}))
        SupervisedExample(prompt='3+4+5=', completion='12')
    """
    fields = _present(row)
    if "instruction" in fields:
        return SupervisedExample(_instruction(row), _text(row, "output"))
    for field in ("messages", "conversations"):
        if field in fields:
            return SupervisedExample((), _conversation(row, field))
    if "prompt" in fields:
        prompt = _string_or_messages(row, "prompt")
        return SupervisedExample(prompt, _completion(row, "completion", prompt))
    if "text" in fields:
        return SupervisedExample("", _text(row, "text"))
    raise ValueError(
        f"{row.where}: no SFT format has the columns {sorted(fields)}. Accepted are: "
        "`instruction` + `output` (+ `input`); `messages` or `conversations`; `prompt` + `completion`; `text`."
    )


def preference_example(row: Row) -> PreferenceExample:
    """Reads a row of DPO, with an explicit prompt, or with the common beginning of two conversations as the prompt.

    Raises:
        ValueError: If a field is missing, of a wrong type, blank, or has an unknown role; if both answers are the same.
    """
    fields = _present(row)
    for field in ("chosen", "rejected"):
        if field not in fields:
            raise ValueError(
                f"{row.where}: field `{field}` is missing, the columns are {sorted(fields)}. Accepted are: `prompt` + "
                "`chosen` + `rejected`; `chosen` + `rejected` as conversations that differ in their last message."
            )
    if row.fields["chosen"] == row.fields["rejected"]:
        raise ValueError(f"{row.where}: `chosen` and `rejected` are the same, so the row says nothing. Drop it.")
    if "prompt" not in fields and "instruction" not in fields:
        return _split_conversations(row)
    prompt = _prompt(row)
    chosen, rejected = (_completion(row, field, prompt) for field in ("chosen", "rejected"))
    for field, answer in (("chosen", chosen), ("rejected", rejected)):
        if isinstance(answer, tuple) and len(answer) != 1:
            raise _bad_field(row, field, f"{len(answer)} messages", "one message of the assistant")
    return PreferenceExample(prompt, chosen, rejected)


def prompt_example(row: Row) -> PromptExample:
    """Reads a row of GRPO or PPO: a prompt, and columns for the rewards.

    Raises:
        ValueError: If the prompt is missing, of a wrong type, blank, has an unknown role or ends with the assistant.
    """
    prompt = _prompt(row)
    used = ("instruction", "input") if isinstance(prompt, Instruction) else ("prompt",)
    return PromptExample(prompt, {name: value for name, value in row.fields.items() if name not in used})


def reward_columns(examples: Sequence[PromptExample]) -> dict[str, list[Any]]:
    """Turns the columns of prompts into one list a column, None where a row has no such column.

    Example:
        >>> reward_columns([PromptExample("3+4=", {"answer": "7"}), PromptExample("Hi", {})])
        {'answer': ['7', None]}
    """
    names = dict.fromkeys(name for example in examples for name in example.columns)
    return {name: [example.columns.get(name) for example in examples] for name in names}


def _present(row: Row) -> set[str]:
    """Columns with a value: parquet and `datasets` fill what a row lacks with null."""
    return {name for name, value in row.fields.items() if value is not None}


def _bad_field(row: Row, field: str, came: str, expected: str) -> ValueError:
    return ValueError(f"{row.where}: field `{field}` is {came}; expected {expected}.")


def _describe(value: Any) -> str:
    return "missing or null" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"


def _text(row: Row, field: str) -> str:
    value = row.fields.get(field)
    if not isinstance(value, str):
        raise _bad_field(row, field, _describe(value), "a string")
    if not value.strip():
        raise _bad_field(row, field, "empty", "a string with text")
    return value


def _instruction(row: Row) -> Instruction:
    value = row.fields.get("input") or ""
    if not isinstance(value, str):
        raise _bad_field(row, "input", _describe(value), "a string")
    return Instruction(_text(row, "instruction"), value)


def _prompt(row: Row) -> Prompt:
    fields = _present(row)
    if "prompt" in fields:
        return _string_or_messages(row, "prompt")
    if "instruction" in fields:
        return _instruction(row)
    raise _bad_field(row, "prompt", f"missing (columns: {sorted(fields)})", "a string or messages; or `instruction`")


def _string_or_messages(row: Row, field: str) -> str | Messages:
    if not isinstance(row.fields[field], list):
        return _text(row, field)
    messages = _messages(row, field)
    if "assistant" in (messages[0].role, messages[-1].role):
        came = f"a conversation of {[message.role for message in messages]}"
        raise _bad_field(row, field, came, "one that neither begins nor ends with the assistant")
    return messages


def _completion(row: Row, field: str, prompt: Prompt) -> Completion:
    if not isinstance(prompt, tuple):
        return _text(row, field)
    if not isinstance(row.fields.get(field), list):
        raise _bad_field(row, field, _describe(row.fields.get(field)), "messages, as the prompt has messages")
    messages = _messages(row, field)
    if messages[0].role != "assistant":
        raise _bad_field(row, field, f"messages that begin with the {messages[0].role}", "the assistant's answer")
    return messages


def _conversation(row: Row, field: str) -> Messages:
    messages = _messages(row, field)
    roles = [message.role for message in messages]
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        raise _bad_field(row, field, f"a conversation of {roles}", "one in which the assistant answers")
    return messages


def _split_conversations(row: Row) -> PreferenceExample:
    for field in ("chosen", "rejected"):
        if isinstance(row.fields[field], str):
            raise _bad_field(row, "prompt", "missing", "a string, as `chosen` and `rejected` are strings")
    chosen, rejected = _conversation(row, "chosen"), _conversation(row, "rejected")
    if chosen[:-1] != rejected[:-1] or {chosen[-1].role, rejected[-1].role} != {"assistant"}:
        raise ValueError(
            f"{row.where}: without `prompt`, the conversations `chosen` and `rejected` must be the same up to the last "
            "message, which is the assistant's. Give the common part as `prompt`."
        )
    return PreferenceExample(chosen[:-1], chosen[-1:], rejected[-1:])


def _messages(row: Row, field: str) -> Messages:
    value = row.fields[field]
    if not isinstance(value, list) or not value:
        raise _bad_field(row, field, _describe(value), "a list of messages, at least one")
    return tuple(_message(row, f"{field}[{index}]", item) for index, item in enumerate(value))


def _message(row: Row, field: str, item: Any) -> Message:
    if isinstance(item, dict) and "role" in item and "content" in item:
        role_key, content_key = "role", "content"
    elif isinstance(item, dict) and "from" in item and "value" in item:
        role_key, content_key = "from", "value"
    else:
        raise _bad_field(row, field, _describe(item), 'an object with "role" and "content", or "from" and "value"')
    role, content = item[role_key], item[content_key]
    if not isinstance(role, str) or role not in ROLES:
        raise _bad_field(row, f"{field}.{role_key}", _describe(role), f"one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise _bad_field(row, f"{field}.{content_key}", _describe(content), "a string")
    if ROLES[role] == "assistant" and not content.strip():
        raise _bad_field(row, f"{field}.{content_key}", "empty", "the assistant's answer")
    return Message(ROLES[role], content)
