"""Single fields of a row, checked: a bad one raises a `ValueError` that says where, which, what came, what is meant."""

import math
from typing import Any

from jaxrl_llm.data.examples import Completion, Instruction, Message, Messages, Prompt
from jaxrl_llm.data.rows import Row

ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
"""Accepted names of roles (the last two are ShareGPT's), and what each is read as."""


def present(row: Row) -> set[str]:
    """Columns with a value: parquet and `datasets` fill what a row lacks with null."""
    return {name for name, value in row.fields.items() if value is not None}


def bad_field(row: Row, field: str, came: str, expected: str) -> ValueError:
    """Makes the error of a field, to be raised."""
    return ValueError(f"{row.where}: field `{field}` is {came}; expected {expected}.")


def describe(value: Any) -> str:
    """Says what came, shortened."""
    return "missing or null" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"


def text(row: Row, field: str) -> str:
    """Reads a string that is not blank."""
    value = row.fields.get(field)
    if not isinstance(value, str):
        raise bad_field(row, field, describe(value), "a string")
    if not value.strip():
        raise bad_field(row, field, "empty", "a string with text")
    return value


def number(row: Row, field: str) -> float:
    """Reads a finite number."""
    value = row.fields.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise bad_field(row, field, describe(value), "a finite number")
    return float(value)


def truth(row: Row, field: str) -> bool:
    """Reads true or false, or 1 or 0."""
    value = row.fields.get(field)
    if not isinstance(value, bool | int | float) or value not in (0, 1):
        raise bad_field(row, field, describe(value), "true or false")
    return bool(value)


def instruction(row: Row) -> Instruction:
    """Reads `instruction` and, if any, `input`."""
    value = row.fields.get("input") or ""
    if not isinstance(value, str):
        raise bad_field(row, "input", describe(value), "a string")
    return Instruction(text(row, "instruction"), value)


def prompt(row: Row) -> Prompt:
    """Reads `prompt`, a string or messages, or `instruction`."""
    fields = present(row)
    if "prompt" in fields:
        return string_or_messages(row, "prompt")
    if "instruction" in fields:
        return instruction(row)
    raise bad_field(row, "prompt", f"missing (columns: {sorted(fields)})", "a string or messages; or `instruction`")


def string_or_messages(row: Row, field: str) -> str | Messages:
    """Reads a prompt: a string, or messages that neither begin nor end with the assistant."""
    if not isinstance(row.fields[field], list):
        return text(row, field)
    turns = messages(row, field)
    if "assistant" in (turns[0].role, turns[-1].role):
        came = f"a conversation of {[message.role for message in turns]}"
        raise bad_field(row, field, came, "one that neither begins nor ends with the assistant")
    return turns


def completion(row: Row, field: str, prompt: Prompt) -> Completion:
    """Reads what follows a prompt: a string after text, messages that begin with the assistant after messages."""
    if not isinstance(prompt, tuple):
        return text(row, field)
    if not isinstance(row.fields.get(field), list):
        raise bad_field(row, field, describe(row.fields.get(field)), "messages, as the prompt has messages")
    turns = messages(row, field)
    if turns[0].role != "assistant":
        raise bad_field(row, field, f"messages that begin with the {turns[0].role}", "the assistant's answer")
    return turns


def answer(row: Row, field: str, prompt: Prompt) -> Completion:
    """Reads one answer to a prompt: a string, or after messages one message of the assistant."""
    value = completion(row, field, prompt)
    if isinstance(value, tuple) and len(value) != 1:
        raise bad_field(row, field, f"{len(value)} messages", "one message of the assistant")
    return value


def conversation(row: Row, field: str) -> Messages:
    """Reads a whole conversation, which the assistant does not begin."""
    turns = messages(row, field)
    roles = [message.role for message in turns]
    if "assistant" not in roles[1:] or roles[0] == "assistant":
        came = f"a conversation of {roles}"
        raise bad_field(row, field, came, "one in which the assistant answers, and which it does not begin")
    return turns


def messages(row: Row, field: str) -> Messages:
    """Reads a list of messages, at least one."""
    value = row.fields[field]
    if not isinstance(value, list) or not value:
        raise bad_field(row, field, describe(value), "a list of messages, at least one")
    return tuple(_message(row, f"{field}[{index}]", item) for index, item in enumerate(value))


def _message(row: Row, field: str, item: Any) -> Message:
    if isinstance(item, dict) and "role" in item and "content" in item:
        role_key, content_key = "role", "content"
    elif isinstance(item, dict) and "from" in item and "value" in item:
        role_key, content_key = "from", "value"
    else:
        raise bad_field(row, field, describe(item), 'an object with "role" and "content", or "from" and "value"')
    role, content = item[role_key], item[content_key]
    if not isinstance(role, str) or role not in ROLES:
        raise bad_field(row, f"{field}.{role_key}", describe(role), f"one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise bad_field(row, f"{field}.{content_key}", describe(content), "a string")
    if ROLES[role] == "assistant" and not content.strip():
        raise bad_field(row, f"{field}.{content_key}", "empty", "the assistant's answer")
    return Message(ROLES[role], content)
