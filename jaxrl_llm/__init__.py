"""Pure functions for post-training language models and for reinforcement learning, in JAX.

Import from the submodules: `jaxrl_llm.losses`, `jaxrl_llm.advantages`, `jaxrl_llm.models`, `jaxrl_llm.rollouts`,
`jaxrl_llm.training` … This file imports nothing, so that `import jaxrl_llm` costs nothing.
"""

__version__ = "0.1.0"
