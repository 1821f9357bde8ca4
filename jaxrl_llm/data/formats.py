"""Dataset formats: what a row of each kind must hold, and the one shape that each kind is read into.

| recipe | columns of a row |
|---|---|
| SFT | `instruction`, `output` and optionally `input` |
| SFT | `messages` or `conversations`: a list of `{"role", "content"}` or ShareGPT `{"from", "value"}` |
| SFT | `prompt` and `completion`: both strings, or both lists of messages |
| SFT, pretraining | `text`: every token is trained |
| DPO, reward model | `prompt` (or `instruction`, `input`), `chosen` and `rejected`: all strings, or all messages |
| DPO, reward model | `chosen` and `rejected` alone: conversations that differ in their last message |
| … either of the two | optionally `margin`, a number: by how much `chosen` is better |
| KTO, BCO | `prompt` (or `instruction`, `input`), `completion` and `label`, true or false |
| KTO, BCO | a row of DPO: read as two rows, one wanted and one not |
| pointwise reward model | `text` and `score` (or `rating`), a number |
| pointwise reward model | `prompt` (or `instruction`, `input`), `completion` and `score` (or `rating`) |
| GRPO, PPO | `prompt` (or `instruction`, `input`): a string or messages; all other columns go to the rewards |

Strings are taken verbatim; instructions and messages go through a template (`jaxrl_llm.data.templates`). Where
`instruction` and another format meet in one row (Alpaca has a `text` too), it is instruction data. A bad row raises a
`ValueError` that says where it stands, which field is wrong, what came and what was expected.
"""

from collections.abc import Sequence
from typing import Any

from jaxrl_llm.data import fields as read
from jaxrl_llm.data.examples import (
    Instruction,
    PreferenceExample,
    PromptExample,
    RatedExample,
    SupervisedExample,
    UnpairedExample,
)
from jaxrl_llm.data.rows import Row


def supervised_example(row: Row) -> SupervisedExample:
    """Reads a row of SFT in any of its formats (table above).

    Raises:
        ValueError: If the row is in no format, or a field is missing, of a wrong type, blank, or has an unknown role.

    Example:
        >>> from jaxrl_llm.data.rows import Row
        >>> supervised_example(Row("a.jsonl, line 1", {"prompt": "3+4+5=", "completion": "12"}))
        SupervisedExample(prompt='3+4+5=', completion='12')
    """
    fields = read.present(row)
    if "instruction" in fields:
        return SupervisedExample(read.instruction(row), read.text(row, "output"))
    for field in ("messages", "conversations"):
        if field in fields:
            return SupervisedExample((), read.conversation(row, field))
    if "prompt" in fields:
        prompt = read.string_or_messages(row, "prompt")
        return SupervisedExample(prompt, read.completion(row, "completion", prompt))
    if "text" in fields:
        return SupervisedExample("", read.text(row, "text"))
    raise ValueError(
        f"{row.where}: no SFT format has the columns {sorted(fields)}. Accepted are: "
        "`instruction` + `output` (+ `input`); `messages` or `conversations`; `prompt` + `completion`; `text`."
    )


def preference_example(row: Row) -> PreferenceExample:
    """Reads a row of DPO, with an explicit prompt, or with the common beginning of two conversations as the prompt.

    Raises:
        ValueError: If a field is missing, of a wrong type, blank, or has an unknown role; if both answers are the same;
            if the margin is no finite number.
    """
    fields = read.present(row)
    for field in ("chosen", "rejected"):
        if field not in fields:
            raise ValueError(
                f"{row.where}: field `{field}` is missing, the columns are {sorted(fields)}. Accepted are: `prompt` + "
                "`chosen` + `rejected`; `chosen` + `rejected` as conversations that differ in their last message."
            )
    if row.fields["chosen"] == row.fields["rejected"]:
        raise ValueError(f"{row.where}: `chosen` and `rejected` are the same, so the row says nothing. Drop it.")
    margin = read.number(row, "margin") if "margin" in fields else None
    if "prompt" not in fields and "instruction" not in fields:
        return _split_conversations(row)._replace(margin=margin)
    prompt = read.prompt(row)
    chosen, rejected = (read.answer(row, field, prompt) for field in ("chosen", "rejected"))
    return PreferenceExample(prompt, chosen, rejected, margin)


def unpaired_examples(row: Row) -> list[UnpairedExample]:
    """Reads a row of KTO or BCO: one example, or from a row of DPO both of its answers, the chosen one first.

    Raises:
        ValueError: As `preference_example`; if `label` is neither true nor false.

    Example:
        >>> from jaxrl_llm.data.rows import Row
        >>> unpaired_examples(Row("a.jsonl, line 1", {"prompt": "3+4=", "chosen": "7", "rejected": "8"}))
        ... # doctest: +NORMALIZE_WHITESPACE
        [UnpairedExample(prompt='3+4=', completion='7', label=True),
         UnpairedExample(prompt='3+4=', completion='8', label=False)]
    """
    fields = read.present(row)
    if {"chosen", "rejected"} & fields and "label" not in fields:
        pair = preference_example(row)
        return [UnpairedExample(pair.prompt, pair.chosen, True), UnpairedExample(pair.prompt, pair.rejected, False)]
    if not {"completion", "label"} <= fields:
        raise ValueError(
            f"{row.where}: no KTO format has the columns {sorted(fields)}. Accepted are: `prompt` + `completion` + "
            "`label`; `prompt` + `chosen` + `rejected`."
        )
    prompt = read.prompt(row)
    return [UnpairedExample(prompt, read.answer(row, "completion", prompt), read.truth(row, "label"))]


def rated_example(row: Row) -> RatedExample:
    """Reads a row of a pointwise reward model: a `text`, or a `prompt` and a `completion`, with a `score` or `rating`.

    Raises:
        ValueError: If a field is missing, of a wrong type or blank; if the score is no finite number.

    Example:
        >>> from jaxrl_llm.data.rows import Row
        >>> rated_example(Row("a.jsonl, line 1", {"text": "A masterpiece.", "rating": 3.2}))
        RatedExample(prompt='', completion='A masterpiece.', score=3.2)
    """
    fields = read.present(row)
    field = "rating" if "rating" in fields and "score" not in fields else "score"
    if field not in fields or not {"text", "completion"} & fields:
        raise ValueError(
            f"{row.where}: no format of ratings has the columns {sorted(fields)}. Accepted are, with a `score` or "
            "`rating`: `text`; `prompt` + `completion`."
        )
    score = read.number(row, field)
    if "completion" not in fields:
        return RatedExample("", read.text(row, "text"), score)
    prompt = read.prompt(row)
    return RatedExample(prompt, read.answer(row, "completion", prompt), score)


def prompt_example(row: Row) -> PromptExample:
    """Reads a row of GRPO or PPO: a prompt, and columns for the rewards.

    Raises:
        ValueError: If the prompt is missing, of a wrong type, blank, has an unknown role or ends with the assistant.
    """
    prompt = read.prompt(row)
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


def _split_conversations(row: Row) -> PreferenceExample:
    for field in ("chosen", "rejected"):
        if isinstance(row.fields[field], str):
            expected = "a string, as `chosen` and `rejected` are strings (where texts have no prompt: the BOS token)"
            raise read.bad_field(row, "prompt", "missing", expected)
    chosen, rejected = read.conversation(row, "chosen"), read.conversation(row, "rejected")
    if chosen[:-1] != rejected[:-1] or {chosen[-1].role, rejected[-1].role} != {"assistant"}:
        raise ValueError(
            f"{row.where}: without `prompt`, the conversations `chosen` and `rejected` must be the same up to the last "
            "message, which is the assistant's. Give the common part as `prompt`."
        )
    return PreferenceExample(chosen[:-1], chosen[-1:], rejected[-1:])
