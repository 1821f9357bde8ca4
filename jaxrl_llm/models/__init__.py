"""Neural networks in Flax Linen: GPT-2 with Hugging Face checkpoints, and small actor-critic networks."""

from jaxrl_llm.models.actor_critic import ActorCritic as ActorCritic
from jaxrl_llm.models.gpt2 import GPT2 as GPT2
from jaxrl_llm.models.gpt2 import head_kernel as head_kernel
from jaxrl_llm.models.gpt2_config import GPT2Config as GPT2Config
from jaxrl_llm.models.pretrained import from_pretrained as from_pretrained
from jaxrl_llm.models.pretrained import save_pretrained as save_pretrained
