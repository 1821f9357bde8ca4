"""Small networks for environments, in Flax Linen: policy and value, and action values."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxrl_llm.distributions import PolicyOutput


class MLP(nn.Module):
    """Dense layers, each but an optional last one followed by the activation.

    Weights are orthogonal, biases zero.

    Attributes:
        hidden_sizes: Width of each layer.
        activation: Applied after each hidden layer.
        output_size: Width of a linear last layer; None for none.
        output_scale: Gain of the last layer's weights.
    """

    hidden_sizes: Sequence[int]
    activation: Callable[[Array], Array] = jnp.tanh
    output_size: int | None = None
    output_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch outputs"]:
        """Applies the layers to the last axis."""
        for index, size in enumerate(self.hidden_sizes):
            x = self.activation(nn.Dense(size, kernel_init=_orthogonal(2**0.5), name=f"hidden_{index}")(x))
        if self.output_size is None:
            return x
        return nn.Dense(self.output_size, kernel_init=_orthogonal(self.output_scale), name="output")(x)


def _orthogonal(scale: float) -> nn.initializers.Initializer:
    return nn.initializers.orthogonal(scale)


class ActorCritic(nn.Module):
    """A policy and a value function.

    By default they are two networks, and the initialisation is the one that PPO is known by: orthogonal, √2 in hidden
    layers, 0.01 for the policy's output (all actions start out about equally likely), 1 for the value. Parameters are
    named `policy/hidden_0 … policy/output` and `value/…`, with `trunk/…` if that is shared.

    Attributes:
        num_actions: Number of discrete actions, or of dimensions of a continuous one.
        hidden_sizes: Width of each hidden layer, of the policy and of the value.
        activation: Applied after each hidden layer.
        shared_trunk: One set of hidden layers for both. It saves computation; but then the value loss moves the policy
            too, so a trust region on the policy no longer holds.
        continuous: The policy is a Gaussian: its output is (mean, log_std), and the parameters `log_std` do not depend
            on the observation.

    Example:
        >>> import jax
        >>> model = ActorCritic(num_actions=2)
        >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 4)))
        >>> logits, value = model.apply(variables, jnp.zeros((8, 4)))
        >>> logits.shape, value.shape
        ((8, 2), (8,))
    """

    num_actions: int
    hidden_sizes: Sequence[int] = (64, 64)
    activation: Callable[[Array], Array] = jnp.tanh
    shared_trunk: bool = False
    continuous: bool = False

    @nn.compact
    def __call__(self, observation: Num[Array, "*batch features"]) -> tuple[PolicyOutput, Float[Array, "*batch"]]:
        """Computes the policy's output and the value.

        Args:
            observation: Observations, with any number of batch axes in front; whole numbers are read as floats.
                (Boards, categories and trees become vectors by `rollouts.spaces.observation_encoder`.)

        Returns:
            Unnormalised log-probabilities of the actions, or (mean, log_std); and the expected discounted return.
        """
        features = observation.astype(jnp.promote_types(observation.dtype, jnp.float32))
        hidden_sizes = self.hidden_sizes
        if self.shared_trunk:
            features, hidden_sizes = MLP(hidden_sizes, self.activation, name="trunk")(features), ()
        output = MLP(hidden_sizes, self.activation, self.num_actions, 0.01, name="policy")(features)
        value = MLP(hidden_sizes, self.activation, 1, 1.0, name="value")(features)
        if not self.continuous:
            return output, value[..., 0]
        log_std = self.param("log_std", nn.initializers.zeros, (self.num_actions,))
        return (output, jnp.broadcast_to(log_std, output.shape)), value[..., 0]


class QNetwork(nn.Module):
    r"""The value of each discrete action.

    Attributes:
        num_actions: Number of actions.
        hidden_sizes: Width of each hidden layer.
        activation: Applied after each hidden layer.
        dueling: Two heads on the hidden layers, $Q(s, a) = V(s) + A(s, a) - \overline{A}(s)$ (Wang et al., 2016, eq. 9).
    """

    num_actions: int
    hidden_sizes: Sequence[int] = (64, 64)
    activation: Callable[[Array], Array] = nn.relu
    dueling: bool = False

    @nn.compact
    def __call__(self, features: Float[Array, "*batch features"]) -> Float[Array, "*batch actions"]:
        """Computes the expected discounted return after each action."""
        if not self.dueling:
            return MLP(self.hidden_sizes, self.activation, self.num_actions, name="values")(features)
        hidden = MLP(self.hidden_sizes, self.activation, name="trunk")(features)
        advantage = MLP((), self.activation, self.num_actions, name="advantage")(hidden)
        value = MLP((), self.activation, 1, name="value")(hidden)
        return value + advantage - advantage.mean(-1, keepdims=True)
