"""Training: the step, and what a run needs around it (checkpoints, logging)."""

from jaxrl_llm.training import checkpoints as checkpoints
from jaxrl_llm.training.references import sync_reference as sync_reference
from jaxrl_llm.training.step import TrainState as TrainState
from jaxrl_llm.training.step import init_train_state as init_train_state
from jaxrl_llm.training.step import make_train_step as make_train_step
