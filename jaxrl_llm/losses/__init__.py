"""Stateless losses: arrays in, `(loss, metrics)` out.

Each is the sum of weight × value (see `jaxrl_llm.reductions`), takes `weights` made from the whole batch or makes its
own from the mask, and returns inside a mapped axis this device's share. Metrics carry no gradient and add up as the
loss does.
"""

from jaxrl_llm.losses.coefficients import EntropyCoefState as EntropyCoefState
from jaxrl_llm.losses.coefficients import KLCoefState as KLCoefState
from jaxrl_llm.losses.coefficients import applied_entropy_coef as applied_entropy_coef
from jaxrl_llm.losses.coefficients import init_entropy_coef as init_entropy_coef
from jaxrl_llm.losses.coefficients import init_kl_coef as init_kl_coef
from jaxrl_llm.losses.coefficients import update_entropy_coef as update_entropy_coef
from jaxrl_llm.losses.coefficients import update_kl_coef as update_kl_coef
from jaxrl_llm.losses.cross_entropy import cross_entropy_loss as cross_entropy_loss
from jaxrl_llm.losses.distillation import distillation_loss as distillation_loss
from jaxrl_llm.losses.distillation import token_mean_divergence as token_mean_divergence
from jaxrl_llm.losses.group_relative import grpo_loss as grpo_loss
from jaxrl_llm.losses.group_relative import grpo_weights as grpo_weights
from jaxrl_llm.losses.leave_one_out import rloo_loss as rloo_loss
from jaxrl_llm.losses.leave_one_out import rloo_weights as rloo_weights
from jaxrl_llm.losses.policy_gradient import policy_gradient_loss as policy_gradient_loss
from jaxrl_llm.losses.policy_gradient import ppo_loss as ppo_loss
from jaxrl_llm.losses.preference import dpo_loss as dpo_loss
from jaxrl_llm.losses.preference import dpo_weights as dpo_weights
from jaxrl_llm.losses.preference import sequence_log_probs as sequence_log_probs
from jaxrl_llm.losses.preference import wpo_weights as wpo_weights
from jaxrl_llm.losses.reference_free import cpo_loss as cpo_loss
from jaxrl_llm.losses.reference_free import orpo_loss as orpo_loss
from jaxrl_llm.losses.reward_model import reward_model_loss as reward_model_loss
from jaxrl_llm.losses.reward_model import reward_regression_loss as reward_regression_loss
from jaxrl_llm.losses.selection import importance_correction as importance_correction
from jaxrl_llm.losses.selection import mask_truncated_completions as mask_truncated_completions
from jaxrl_llm.losses.selection import off_policy_mask as off_policy_mask
from jaxrl_llm.losses.selection import top_entropy_mask as top_entropy_mask
from jaxrl_llm.losses.temporal_difference import q_learning_loss as q_learning_loss
from jaxrl_llm.losses.unpaired import RunningMean as RunningMean
from jaxrl_llm.losses.unpaired import bco_loss as bco_loss
from jaxrl_llm.losses.unpaired import kto_kl as kto_kl
from jaxrl_llm.losses.unpaired import kto_loss as kto_loss
from jaxrl_llm.losses.unpaired import unpaired_weights as unpaired_weights
from jaxrl_llm.losses.unpaired import update_running_mean as update_running_mean
from jaxrl_llm.losses.value import value_loss as value_loss
