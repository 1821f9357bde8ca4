"""Optimizers: optax's, put together the way that language models and control are trained."""

from jaxrl_llm.optimizers.first_order import make_optimizer as make_optimizer
from jaxrl_llm.optimizers.first_order import make_schedule as make_schedule
from jaxrl_llm.optimizers.fisher import categorical_fisher as categorical_fisher
from jaxrl_llm.optimizers.fisher import chunked_categorical_fisher as chunked_categorical_fisher
from jaxrl_llm.optimizers.fisher import fisher_vector_product as fisher_vector_product
from jaxrl_llm.optimizers.fisher import gaussian_fisher as gaussian_fisher
from jaxrl_llm.optimizers.linear_solve import conjugate_gradient as conjugate_gradient
from jaxrl_llm.optimizers.natural_gradient import NaturalGradientState as NaturalGradientState
from jaxrl_llm.optimizers.natural_gradient import natural_gradient as natural_gradient
from jaxrl_llm.optimizers.natural_gradient import natural_gradient_metrics as natural_gradient_metrics
