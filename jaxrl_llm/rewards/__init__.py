"""Rewards: functions of text on the host, in TRL's signature, and functions of token ids that can be traced.

host       reward(prompts, completions, **columns) -> list[float | None]      what fails: scoring.py
traceable  reward(completion_ids, completion_mask, ...) -> [rows]             a GRPO iteration under one jit
credit     scores of completions -> rewards and advantages of their tokens    PPO and REINFORCE: credit.py

On a command line, `--reward-funcs` takes a short name from the table, package.module:function or path/file.py:function;
options follow in parentheses, such as 'soft_overlong(max_completion_length=256, cache=20)', quoted from the shell.

| short name | reward | columns |
|---|---|---|
| `exact_match` | 1 if the completion is the answer, white space around it apart | `answer` |
| `numeric_match` | 1 if its last number is the last number of the answer | `answer` |
| `answer_match(mark="hash", tag="answer")` | 1 if what is marked is the answer: `####`, boxed, or tag | `answer` |
| `think_format` | 1 if it begins with its reasoning in <think>…</think> | |
| `tag_format(tags=("think", "answer"), strict=True)` | 1 if each tag opens and closes once, in order | |
| `correct_equations` | share of its equations that are right, by exact calculation; None without any | |
| `uses_numbers(use_all=True, tag="answer")` | 1 if it makes the target from the numbers (Countdown) | `numbers`, `target` |
| `soft_overlong(max_completion_length, cache)` | from 0 to −1 near the longest length (DAPO) | `completion_ids` |
| `repetition_penalty(ngram_size=3, max_penalty=-1.0)` | penalty of repeated n-grams | `completion_ids` |
| `cosine_scaled(max_length, correct="numeric_match", …)` | right: falls with length; wrong: rises | `completion_ids`, … |
| `guide_example` | 1 for 50 to 200 characters, 0.5 for each of 好, 优秀, 正确, 是的 | |
| `task_score(tag="answer")` | in [0, 1], by the scorer of a task of reasoning-gym, guarded (tasks.py) | of `task_rows` |
| `exact_match_tokens` | traceable: 1 if the tokens are the answer's | `answer_ids`, `answer_mask` |

Recipes give `prompt_ids` and `completion_ids` too, and know `reward_model:path/to/folder`, the score of a saved reward
model (`jaxrl_llm.recipes.text.model_rewards`).
"""

from jaxrl_llm.rewards.answers import answer_match as answer_match
from jaxrl_llm.rewards.answers import boxed_answer as boxed_answer
from jaxrl_llm.rewards.answers import hash_answer as hash_answer
from jaxrl_llm.rewards.answers import tagged_answer as tagged_answer
from jaxrl_llm.rewards.arithmetic import correct_equations as correct_equations
from jaxrl_llm.rewards.arithmetic import evaluate_arithmetic as evaluate_arithmetic
from jaxrl_llm.rewards.arithmetic import uses_numbers as uses_numbers
from jaxrl_llm.rewards.calls import OnError as OnError
from jaxrl_llm.rewards.calls import Reward as Reward
from jaxrl_llm.rewards.calls import RewardError as RewardError
from jaxrl_llm.rewards.credit import ResponseAdvantages as ResponseAdvantages
from jaxrl_llm.rewards.credit import penalize_missing_eos as penalize_missing_eos
from jaxrl_llm.rewards.credit import response_advantages as response_advantages
from jaxrl_llm.rewards.credit import soft_overlong_punishment as soft_overlong_punishment
from jaxrl_llm.rewards.credit import step_mask as step_mask
from jaxrl_llm.rewards.credit import token_rewards as token_rewards
from jaxrl_llm.rewards.formats import tag_format as tag_format
from jaxrl_llm.rewards.formats import think_format as think_format
from jaxrl_llm.rewards.loading import load_reward as load_reward
from jaxrl_llm.rewards.loading import makes_reward as makes_reward
from jaxrl_llm.rewards.scoring import RewardTable as RewardTable
from jaxrl_llm.rewards.scoring import evaluate_rewards as evaluate_rewards
from jaxrl_llm.rewards.shaping import cosine_scaled as cosine_scaled
from jaxrl_llm.rewards.shaping import guide_example as guide_example
from jaxrl_llm.rewards.shaping import repetition_penalty as repetition_penalty
from jaxrl_llm.rewards.shaping import soft_overlong as soft_overlong
from jaxrl_llm.rewards.tasks import named_task_rows as named_task_rows
from jaxrl_llm.rewards.tasks import task_rows as task_rows
from jaxrl_llm.rewards.tasks import task_score as task_score
from jaxrl_llm.rewards.text import exact_match as exact_match
from jaxrl_llm.rewards.text import numeric_match as numeric_match
from jaxrl_llm.rewards.tokens import exact_match_tokens as exact_match_tokens

SHORT_NAMES = (
    "exact_match",
    "numeric_match",
    "answer_match",
    "think_format",
    "tag_format",
    "correct_equations",
    "uses_numbers",
    "soft_overlong",
    "repetition_penalty",
    "cosine_scaled",
    "guide_example",
    "task_score",
    "exact_match_tokens",
)
"""Names that `load_reward` finds here."""
