"""Neural networks in Flax Linen: GPT-2 and the Llama family with their checkpoints, heads, and small actor-critics."""

from jaxrl_llm.models.actor_critic import ActorCritic as ActorCritic
from jaxrl_llm.models.decoder import Decoder as Decoder
from jaxrl_llm.models.decoder import DecoderConfig as DecoderConfig
from jaxrl_llm.models.decoder import head_kernel as head_kernel
from jaxrl_llm.models.gguf import from_gguf as from_gguf
from jaxrl_llm.models.gpt2 import GPT2 as GPT2
from jaxrl_llm.models.gpt2_config import GPT2Config as GPT2Config
from jaxrl_llm.models.heads import ScalarHead as ScalarHead
from jaxrl_llm.models.heads import last_token_values as last_token_values
from jaxrl_llm.models.heads import scalar_head_params as scalar_head_params
from jaxrl_llm.models.llama import Llama as Llama
from jaxrl_llm.models.llama_config import LlamaConfig as LlamaConfig
from jaxrl_llm.models.llama_config import RopeScaling as RopeScaling
from jaxrl_llm.models.lora import Adapted as Adapted
from jaxrl_llm.models.lora import LoraConfig as LoraConfig
from jaxrl_llm.models.lora import adapt as adapt
from jaxrl_llm.models.lora import init_lora as init_lora
from jaxrl_llm.models.lora import join_trainable as join_trainable
from jaxrl_llm.models.lora import load_adapters as load_adapters
from jaxrl_llm.models.lora import merge_lora as merge_lora
from jaxrl_llm.models.lora import save_adapters as save_adapters
from jaxrl_llm.models.lora import split_trainable as split_trainable
from jaxrl_llm.models.pretrained import from_pretrained as from_pretrained
from jaxrl_llm.models.pretrained import from_pretrained_reward_model as from_pretrained_reward_model
from jaxrl_llm.models.pretrained import is_reward_model as is_reward_model
from jaxrl_llm.models.pretrained import save_pretrained as save_pretrained
