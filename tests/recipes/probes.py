"""Environments whose right answer is known by hand (after Andy Jones, 2021), registered with gymnax by name."""

import gymnax
import jax
import jax.numpy as jnp
from gymnax.environments import environment, spaces


class Clock(environment.Environment):
    """Pays 1 for every step for ever; only a time limit of 8 steps interrupts it. Shows nothing."""

    def step_env(self, key, state, action, params):
        state = state.replace(time=state.time + 1)
        return jnp.ones(1), state, jnp.float32(1), jnp.array(False), {}

    def reset_env(self, key, params):
        return jnp.ones(1), environment.EnvState(time=jnp.int32(0))

    @property
    def default_params(self):
        return environment.EnvParams(max_steps_in_episode=8)

    def action_space(self, params):
        return spaces.Discrete(2)

    def observation_space(self, params):
        return spaces.Box(0, 1, (1,))


class Match(Clock):
    """Two steps: shows -1 or 1, then 0; pays, at the end, 1 if the FIRST action matched the sign."""

    def step_env(self, key, state, action, params):
        sign, matched, time = state.time // 4, (state.time // 2) % 2, state.time % 2
        matched = jnp.where(time == 0, action == sign, matched).astype(jnp.int32)
        reward = jnp.where(time == 1, matched, 0).astype(jnp.float32)
        state = state.replace(time=4 * sign + 2 * matched + time + 1)
        return jnp.zeros(1), state, reward, time == 1, {}

    def reset_env(self, key, params):
        sign = jax.random.bernoulli(key).astype(jnp.int32)
        return 2.0 * sign[None] - 1.0, environment.EnvState(time=4 * sign)

    @property
    def default_params(self):
        return environment.EnvParams(max_steps_in_episode=16)


class Reach(Clock):
    """One step: shows a number in [-1, 1], and pays minus the squared distance of the continuous action from half of it."""

    def step_env(self, key, state, action, params):
        reward = -((action[0] - 0.5 * (state.time / 1000 - 1)) ** 2)
        return jnp.zeros(1), state.replace(time=jnp.int32(0)), reward, jnp.array(True), {}

    def reset_env(self, key, params):
        thousandths = jax.random.randint(key, (), 0, 2001)
        return thousandths[None] / 1000.0 - 1.0, environment.EnvState(time=thousandths)

    @property
    def default_params(self):
        return environment.EnvParams(max_steps_in_episode=10_000)

    def action_space(self, params):
        return spaces.Box(-1, 1, (1,))


gymnax.register("Clock-probe", Clock)
gymnax.register("Match-probe", Match)
gymnax.register("Reach-probe", Reach)
