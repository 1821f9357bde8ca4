"""Stateless losses: arrays in, `(loss, metrics)` out.

Each is the sum of weight × value (see `jaxrl_llm.reductions`), takes `weights` made from the whole batch or makes its
own from the mask, and returns inside a mapped axis this device's share. Metrics carry no gradient and add up as the
loss does.
"""

from jaxrl_llm.losses.cross_entropy import cross_entropy_loss as cross_entropy_loss
from jaxrl_llm.losses.group_relative import grpo_loss as grpo_loss
from jaxrl_llm.losses.policy_gradient import policy_gradient_loss as policy_gradient_loss
from jaxrl_llm.losses.policy_gradient import ppo_loss as ppo_loss
from jaxrl_llm.losses.preference import dpo_loss as dpo_loss
from jaxrl_llm.losses.reward_model import reward_model_loss as reward_model_loss
from jaxrl_llm.losses.value import value_loss as value_loss
