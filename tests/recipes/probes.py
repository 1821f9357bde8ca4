"""Environments whose right answer is known by hand (after Andy Jones, 2021), registered with gymnax by name."""

import gymnax
import jax
import jax.numpy as jnp
from flax import struct
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


@struct.dataclass
class ExamState(environment.EnvState):
    problem: jax.Array
    sign: jax.Array
    right: jax.Array


class Exam(Clock):
    """One of six problems, shown as a category, beside a signal; a network that has learned all of them passes.

    0: pays 1.            1: pays the signal, -1 or 1.      2: pays 1 after a second step.
    3: pays 1 for action 1, else -1.   4: pays 1 if the action has the signal's sign, else -1.
    5: pays, after a second step whose action does not matter, 1 if the first had the signal's sign, else -1.
    """

    def step_env(self, key, state, action, params):
        fits = jnp.where(action == state.sign, 1, -1)
        right = jnp.where(state.time == 0, fits, state.right)
        at_once = jnp.array([1, 2 * state.sign - 1, 0, 2 * action - 1, fits, 0])[state.problem]
        late = jnp.array([0, 0, 1, 0, 0, right])[state.problem]
        ends = (state.time == 1) | ((state.problem != 2) & (state.problem != 5))
        reward = jnp.where(state.time == 0, at_once, late).astype(jnp.float32)
        state = state.replace(time=state.time + 1, right=right)
        return {"problem": state.problem, "signal": jnp.zeros(1)}, state, reward, ends, {}

    def reset_env(self, key, params):
        problem_key, sign_key = jax.random.split(key)
        problem, sign = jax.random.randint(problem_key, (), 0, 6), jax.random.randint(sign_key, (), 0, 2)
        state = ExamState(time=jnp.int32(0), problem=problem, sign=sign, right=jnp.int32(0))
        return {"problem": problem, "signal": 2.0 * sign[None] - 1.0}, state

    @property
    def default_params(self):
        return environment.EnvParams(max_steps_in_episode=2)

    def observation_space(self, params):
        return spaces.Dict({"problem": spaces.Discrete(6), "signal": spaces.Box(-1, 1, (1,))})


def exam(gamma):
    """What a network must know: its observations, [13], their values, and the better action (-1: none is)."""
    shown = [(problem, signal) for problem in range(6) for signal in (-1.0, 1.0)] + [(2, 0.0)]
    observation = {"problem": jnp.array([p for p, _ in shown]), "signal": jnp.array([[s] for _, s in shown])}
    values = jnp.array([1, 1, -1, 1, gamma, gamma, 1, 1, 1, 1, gamma, gamma, 1])
    return observation, values, jnp.array([-1, -1, -1, -1, -1, -1, 1, 1, 0, 1, 0, 1, -1])


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
gymnax.register("Exam-probe", Exam)
gymnax.register("Reach-probe", Reach)
