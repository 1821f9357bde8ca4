"""Tasks of reasoning-gym by name: rows of prompts, and a reward by the task's own scorer (`pip install 'jaxrl-llm[tasks]'`).

Its scorers were written for people's answers. A model writes anything, and in 0.1.25 some of them raise, pay for garbage, or
run it. Every score is guarded: nothing (an empty answer, or one of more than 10,000 characters) is worth 0; so is an answer
on which the scorer raises, one that reads as NaN or an infinity, or has an exponent of four digits or more, unless it is
the stored one; the score is cut to [0, 1]; and the scorer is given a copy of the entry, to do with as it likes. Beyond that:

| tasks | what is wrong | instead |
|---|---|---|
| `string_insertion`, `spiral_matrix`, `binary_matrix` | the answer is run by `eval` | exact match |
| `polynomial_multiplication` | the answer is run by sympy's `parse_expr`, an `eval` | exact match, spaces apart |
| `n_queens` | `eval` | one of the stored solutions |
| `countdown`, `puzzle24` | `parse_expr`; `puzzle24` does not look which numbers are used | `rewards.arithmetic` |
| `game_of_life_halting` | any text is worth 1 where the answer is False | exact match |
| `coin_flip` | a beginning of the number ("0") is worth 1 | equal numbers |
| `simple_integration`, `intermediate_integration` | `parse_expr`, and no canonical answer | refused |
| `boxnet`, `graph_color`, `propositional_logic`, `rubiks_cube`, `rush_hour` | no stored answer to check by | refused |
| `composite` | several tasks in one | refused: join the rows |

Partial credit is the scorer's own: several pay 0.01 or 0.05 for any answer at all.
"""

import copy
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

from jaxrl_llm.rewards.answers import same_answer, tagged_answer
from jaxrl_llm.rewards.arithmetic import solves
from jaxrl_llm.rewards.loading import CALL, makes_reward, parse_options
from jaxrl_llm.rewards.text import completion_text

Split = Literal["train", "held_out", "all"]
Entry = dict[str, Any]

NO_CANONICAL_ANSWER = "its scorer runs the answer (sympy's parse_expr), and there is no one way to write it"
NO_STORED_ANSWER = "it stores no answer, so that its scorer cannot be checked"
REFUSED = {
    **dict.fromkeys(("simple_integration", "intermediate_integration"), NO_CANONICAL_ANSWER),
    **dict.fromkeys(("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"), NO_STORED_ANSWER),
    "composite": "it is several tasks in one: make the rows of each and join them",
}
MAX_CHARACTERS = 10_000
ODD_NUMBER = re.compile(r"\b(?:s?nan|inf|infinity)\b|[0-9.]e[+-]?[0-9]{4}", re.IGNORECASE)


def _exact(text: str, entry: Entry) -> float:
    return float(same_answer(text, entry["answer"]))


def _exact_without_spaces(text: str, entry: Entry) -> float:
    return float("".join(text.split()) == "".join(entry["answer"].split()))


def _stored(text: str, entry: Entry) -> float:
    return float(any(text.split("\n") == answer.split("\n") for answer in entry["metadata"]["valid_answers"]))


def _countdown(text: str, entry: Entry) -> float:
    return solves(text, entry["metadata"]["numbers"], entry["metadata"].get("target", 24))


REPLACED: dict[str, Callable[[str, Entry], float]] = {
    **dict.fromkeys(
        ("string_insertion", "spiral_matrix", "binary_matrix", "game_of_life_halting", "coin_flip"), _exact
    ),
    "polynomial_multiplication": _exact_without_spaces,
    "n_queens": _stored,
    "countdown": _countdown,
    "puzzle24": _countdown,
}


def task_rows(
    name: str,
    *,
    size: int = 1000,
    seed: int = 0,
    split: Split = "all",
    held_out: float = 0.1,
    template: str = "{question}",
    chat: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Makes prompts of a task, each question once.

    Args:
        name: Of the task, such as "chain_sum".
        size: Rows at most. There are fewer if the task has no more questions: the search ends after 4 × size + 100.
        seed: Of the questions.
        split: "train" or "held_out": the rows of one side; "all": both. A question is on one side whatever the seed, the
            size and the options, by a hash of its text, so that the sides never share one.
        held_out: Share of the questions that is held out, in (0, 1).
        template: The prompt, with {question} in it.
        chat: Prompts are a message of the user each, for the template of a chat model.
        options: Those of the task, such as `min_terms=2, max_digits=1`.

    Returns:
        Rows with `prompt`, `answer`, `metadata`, and the column `task`, from which `task_score` makes the entry again.

    Raises:
        ImportError: If reasoning-gym is not installed.
        ValueError: If there is no such task, it is refused, an option is wrong, or no row is left.

    Example:
        >>> task_rows("chain_sum", size=2, min_terms=2, max_terms=2)[0]["prompt"]  # doctest: +SKIP
        'State the final answer to the following arithmetic problem: 75 + 51 ='
    """
    if size < 1 or split not in get_args(Split) or not 0 < held_out < 1 or "{question}" not in template:
        raise ValueError(
            f"size must be at least 1, split one of {get_args(Split)}, held_out between 0 and 1, and {{question}} in the "
            f"template; got {size=}, {split=}, {held_out=}, {template=}."
        )
    origin = {"name": name, "size": 4 * size + 100, "seed": seed, "options": options}
    rows, seen = [], set()
    for index, entry in _entries(origin):
        question = entry["question"]
        if question in seen or (split != "all" and _is_held_out(question, held_out) != (split == "held_out")):
            continue
        seen.add(question)
        text = template.replace("{question}", question)
        prompt = [{"role": "user", "content": text}] if chat else text
        task = {**origin, "index": index}
        rows.append({"prompt": prompt, "answer": entry["answer"], "metadata": entry["metadata"], "task": task})
        if len(rows) == size:
            break
    if not rows:
        raise ValueError(f"No question of {name!r} is on the side {split!r}: raise size or held_out={held_out}.")
    return rows


def named_task_rows(name: str, *, split: str = "train") -> list[dict[str, Any]]:
    """Makes the rows of a task from one string, as a command line gives it.

    Args:
        name: "chain_sum", or with arguments of `task_rows` and options of the task: "chain_sum(size=500, min_terms=2)".
        split: As in `task_rows`.

    Raises:
        ImportError: As `task_rows`.
        ValueError: As `task_rows`; and if the name has another form.
    """
    call = CALL.fullmatch(name)
    options: dict[str, Any] = {"split": split, **(parse_options(call["options"], name) if call else {})}
    return task_rows(call["name"] if call else name, **options)


@makes_reward
def task_score(*, tag: str = "answer") -> Callable[..., list[float | None]]:
    """Makes a reward in [0, 1] by the scorer of the task, guarded as the module says.

    Args:
        tag: Scored is what stands in the last <tag>…</tag>; without one, the whole completion.

    Returns:
        `reward(completions, answer, task)`, with the columns of `task_rows`. A row whose `task` is None gives None.

    Raises:
        ValueError: When it is called: if reasoning-gym makes another answer than the one of the row.
    """

    def score(completion: Any, answer: str, task: dict[str, Any] | None) -> float | None:
        if task is None:
            return None
        text = completion_text(completion)
        tagged = tagged_answer(text, tag)
        return _guarded((text if tagged is None else tagged).strip(), answer, task)

    def task_score(
        completions: Sequence[Any], answer: Sequence[Any], task: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        return [score(*row) for row in zip(completions, answer, task, strict=True)]

    return task_score


def _guarded(text: str, answer: str, task: dict[str, Any]) -> float:
    options = json.dumps(task["options"], sort_keys=True)
    dataset = _dataset(task["name"], task["size"], task["seed"], options)
    entry = _entry(task["name"], task["size"], task["seed"], options, task["index"])
    if entry["answer"] != answer:
        raise ValueError(
            f"The answer of the row is {str(answer)[:60]!r}, and {task['name']!r} gives {entry['answer'][:60]!r}: another "
            "release of reasoning-gym made the row. Make the rows anew."
        )
    odd = ODD_NUMBER.search(text) is not None and not same_answer(text, answer)
    if not text or len(text) > MAX_CHARACTERS or odd:
        return 0.0
    replacement = REPLACED.get(task["name"])
    try:
        score = float(replacement(text, entry) if replacement else dataset.score_answer(text, copy.deepcopy(entry)))
    except Exception:  # whatever the scorer does with malformed text
        return 0.0
    return min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0


def _is_held_out(question: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8], "big") < share * 2**64


def _entries(task: dict[str, Any]) -> Iterator[tuple[int, Entry]]:
    try:
        options = json.dumps(task["options"], sort_keys=True)
    except TypeError as error:
        raise ValueError(f"options of a task must be numbers, strings and lists: {error}.") from error
    dataset = _dataset(task["name"], task["size"], task["seed"], options)
    for index in range(task["size"]):
        yield index, dataset[index]


@functools.lru_cache(maxsize=4096)
def _entry(name: str, size: int, seed: int, options: str, index: int) -> Entry:
    return _dataset(name, size, seed, options)[index]


@functools.lru_cache(maxsize=16)
def _dataset(name: str, size: int, seed: int, options: str) -> Any:
    try:
        import reasoning_gym  # pyright: ignore[reportMissingImports]: an extra
    except ImportError as error:
        raise ImportError(f"tasks need reasoning-gym ({error}): pip install 'jaxrl-llm[tasks]'.") from error
    known = reasoning_gym.factory.DATASETS
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=3)
        meant = (
            f"Did you mean {' or '.join(map(repr, nearest))}?" if nearest else f"There are {', '.join(sorted(known))}."
        )
        raise ValueError(f"reasoning-gym has no task {name!r}. {meant}")
    if name in REFUSED:
        raise ValueError(f"The task {name!r} cannot be used: {REFUSED[name]}.")
    settings = json.loads(options)
    fields = [field.name for field in dataclasses.fields(known[name][1]) if field.name not in ("seed", "size")]
    if unknown := sorted(set(settings) - set(fields)):
        raise ValueError(f"The task {name!r} has no option {', '.join(unknown)}; it has {', '.join(fields)}.")
    try:
        return reasoning_gym.create_dataset(name, size=size, seed=seed, **settings)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"The options {options} of the task {name!r} do not fit: {error}.") from error
