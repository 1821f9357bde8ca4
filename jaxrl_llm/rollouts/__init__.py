"""Rollouts: text sampled from a language model, steps taken in environments, and the scoring of given text."""

from jaxrl_llm.rollouts.scoring import score_completions as score_completions
from jaxrl_llm.rollouts.scoring import score_tokens as score_tokens
from jaxrl_llm.rollouts.text import Completions as Completions
from jaxrl_llm.rollouts.text import generate as generate
