"""Rollouts: text sampled from a language model, steps taken in environments, and the scoring of given text."""

from jaxrl_llm.rollouts.environment import EnvironmentState as EnvironmentState
from jaxrl_llm.rollouts.environment import Transition as Transition
from jaxrl_llm.rollouts.environment import reset as reset
from jaxrl_llm.rollouts.environment import rollout as rollout
from jaxrl_llm.rollouts.policy import policy_functions as policy_functions
from jaxrl_llm.rollouts.registry import make_environment as make_environment
from jaxrl_llm.rollouts.scoring import score_completions as score_completions
from jaxrl_llm.rollouts.scoring import score_tokens as score_tokens
from jaxrl_llm.rollouts.text import Completions as Completions
from jaxrl_llm.rollouts.text import generate as generate
