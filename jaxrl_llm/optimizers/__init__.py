"""Optimizers: optax's, put together the way that language models and control are trained."""

from jaxrl_llm.optimizers.first_order import make_optimizer as make_optimizer
from jaxrl_llm.optimizers.first_order import make_schedule as make_schedule
