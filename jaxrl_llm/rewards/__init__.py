"""Rewards: functions of text on the host, in TRL's signature, and functions of token ids that can be traced.

host       reward(prompts, completions, **columns) -> list[float | None]      loading.py, scoring.py, text.py
traceable  reward(completion_ids, completion_mask, ...) -> [rows]             tokens.py: a GRPO iteration under one jit
"""

from jaxrl_llm.rewards.loading import load_reward as load_reward
from jaxrl_llm.rewards.scoring import Reward as Reward
from jaxrl_llm.rewards.scoring import RewardTable as RewardTable
from jaxrl_llm.rewards.scoring import evaluate_rewards as evaluate_rewards
from jaxrl_llm.rewards.text import exact_match as exact_match
from jaxrl_llm.rewards.text import numeric_match as numeric_match
from jaxrl_llm.rewards.tokens import exact_match_tokens as exact_match_tokens
