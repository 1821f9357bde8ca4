"""The value function of PPO for text: what reward a completion will still earn, before each of its tokens."""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from jaxrl_llm.log_probs import TokenStatistics, chunked_token_statistics
from jaxrl_llm.models import ScalarHead, from_pretrained_reward_model, scalar_head_params
from jaxrl_llm.recipes.text.experience import Experience, Policy
from jaxrl_llm.recipes.text.language_model import LanguageModel, in_host_memory
from jaxrl_llm.recipes.text.model_rewards import same_tokens
from jaxrl_llm.rollouts.scoring import Apply, completion_outputs
from jaxrl_llm.training.parallel import shard
from jaxrl_llm.types import Key, Params

ValueNetwork: TypeAlias = Literal["shared", "separate"]


class ActorCriticParams(NamedTuple):
    """What PPO trains.

    Attributes:
        policy: The language model (with LoRA, its adapters).
        value: The value network: a head on the policy's hidden states, or a network of its own.
    """

    policy: Params
    value: Params


class Critic(NamedTuple):
    """How values are computed.

    Attributes:
        start: `start(key, policy_params) -> ActorCriticParams`.
        score: `score(policy, params, experience) -> (statistics, values)`, of each token of the completions.
    """

    start: Callable[[Key, Params], ActorCriticParams]
    score: Callable[[Policy, ActorCriticParams, Experience], tuple[TokenStatistics, Float[Array, "rows time"]]]


def make_critic(
    model: LanguageModel, network: ValueNetwork, value_model: str = "", *, mesh: Mesh | None = None
) -> Critic:
    """Makes the critic of a language model.

    Args:
        model: The policy.
        network: `shared`: a linear head on the policy's hidden states, which cost nothing more; `separate`: a network of
            its own, which begins as a copy of the policy.
        value_model: Folder of a reward model that a separate network begins as.
        mesh: Devices to divide that reward model over.

    Raises:
        ValueError: If `value_model` does not read the tokens of the policy.
    """
    assert not isinstance(model.module, ScalarHead)
    zeros = jnp.zeros((model.module.config.width, 1))
    if network == "shared":
        return Critic(lambda key, policy: ActorCriticParams(policy, {"kernel": zeros}), _score_shared)
    with in_host_memory():
        module, params = _value_module(model, value_model)
    params = shard(params, mesh)

    def start(key: Key, policy: Params) -> ActorCriticParams:
        if params is not None:
            return ActorCriticParams(policy, params)
        # A copy, for the step gives the memory of its state away; the head begins with values of zero.
        copied = scalar_head_params(key, jax.tree.map(jnp.copy, policy))
        return ActorCriticParams(policy, copied | {"score": {"kernel": zeros}})

    return Critic(start, _score_with(module.apply))


def _value_module(model: LanguageModel, value_model: str) -> tuple[ScalarHead, Params | None]:
    assert not isinstance(model.module, ScalarHead)
    if not value_model:
        return ScalarHead(model.module), None
    config = model.module.config
    settings = {name: getattr(config, name) for name in ("dtype", "remat")}
    module, params, tokenizer = from_pretrained_reward_model(value_model, **settings)
    if tokenizer is None or not same_tokens(tokenizer, model.tokenizer):
        raise ValueError(f"value_model={value_model!r} has other tokens than the policy, or holds no tokenizer.")
    if module.backbone.config.context_length < model.context_length:
        raise ValueError(
            f"value_model={value_model!r} reads {module.backbone.config.context_length} tokens, fewer than the policy's "
            f"{model.context_length}."
        )
    return module, params


def _score_shared(policy: Policy, params: ActorCriticParams, experience: Experience) -> tuple[TokenStatistics, Array]:
    hidden = completion_outputs(policy.apply, params.policy, *experience.text, output="hidden")
    statistics = chunked_token_statistics(
        hidden,
        policy.head_kernel(params.policy),
        experience.completion_ids,
        temperature=policy.temperature,
        chunk_size=policy.chunk_size,
    )
    kernel = params.value["kernel"]
    return statistics, jnp.matmul(hidden.astype(kernel.dtype), kernel)[..., 0]


def _score_with(apply: Apply):
    def score(policy: Policy, params: ActorCriticParams, experience: Experience) -> tuple[TokenStatistics, Array]:
        return policy.score(params.policy, experience), completion_outputs(apply, params.value, *experience.text)

    return score
