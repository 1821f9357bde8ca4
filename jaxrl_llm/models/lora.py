"""LoRA: low-rank adapters beside the kernels of a frozen model.

An adapted layer computes y = x W + s · dropout(x) A B with rank r and s = lora_alpha / r; W stays as it is, and no merged
copy of it is ever made. DoRA rescales each output, x (W + s A B) · m / ‖W + s A B‖, by a trained magnitude m; the norm, of a
column, counts as a constant in the gradient. Adapters are a tree of their own, with the paths of what they adapt:

    blocks/qkv      a [layers, in, r], b [layers, r, out], with DoRA m [layers, out]
    score/kernel    [hidden, 1], only of a `ScalarHead`: the new head is trained whole
    blocks/…/bias   biases that are trained whole too, if `bias` says so

    params = adapt(key, params, LoraConfig(r=8))             # Adapted(base, lora, config)
    logits, _ = module.apply({"params": params}, tokens)     # as with plain parameters: sampling and scoring too
    trainable, frozen = split_trainable(params)              # frozen is also the reference policy: the adapters are off
    loss = loss_fn(join_trainable(trainable, frozen), …)     # differentiate by `trainable`
    save_pretrained(folder, module, merge_lora(params), tokenizer)

References:
    Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; the scale of rsLoRA:
    Kalajdzievski, 2023, arXiv 2312.03732; DoRA: Liu et al., 2024, arXiv 2402.09353, eq. 5 and section 4.3. Names and initial
    values are those of PEFT.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jaxtyping import Array

from jaxrl_llm.models.quantization import Quantized, dequantize
from jaxrl_llm.models.trees import flat_leaves, linear_kernels
from jaxrl_llm.types import Key, Params

ALL_LINEAR = "all-linear"
DEFAULT_TARGETS = ("qkv", "query", "value")
"""What is adapted by default: GPT-2's fused projection of queries, keys and values; of Llama, queries and values."""
PAIR = ("a", "b", "m")
"""Leaves of adapters; all others in their tree stand in the place of the base's."""


Bias = Literal["none", "all", "lora_only"]


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What is adapted and how, under PEFT's names.

    Attributes:
        r: Rank of the adapters, at least 1.
        lora_alpha: Scale of what they add, times `r` (with `use_rslora`, times √r).
        lora_dropout: Probability of dropping an input of an adapter in training, in [0, 1).
        target_modules: Layers to adapt: each a name (`query`) or a regular expression for a whole path
            (`blocks/mlp_.*`), or `all-linear`; empty: `DEFAULT_TARGETS`.
        use_rslora: Divide lora_alpha by √r instead of r, so that large ranks learn as fast as small ones.
        use_dora: Train a magnitude for each output of an adapted layer too (DoRA).
        bias: Biases to train besides: none, those of the adapted layers (lora_only), or all.

    Raises:
        ValueError: If a number is out of its range.
    """

    r: int = 8
    lora_alpha: int | float = 16
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = ()
    use_rslora: bool = False
    use_dora: bool = False
    bias: Bias = "none"

    def __post_init__(self):
        targets = self.target_modules
        targets = (targets,) if isinstance(targets, str) else tuple(targets)  # a list could not be hashed
        object.__setattr__(self, "target_modules", targets)
        if self.r < 1:
            raise ValueError(f"r must be at least 1, got {self.r}.")
        if not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha must be positive, got {self.lora_alpha}.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is a probability in [0, 1), got {self.lora_dropout}.")
        if self.bias not in get_args(Bias):
            raise ValueError(f"bias must be one of {get_args(Bias)}, got {self.bias!r}.")

    @property
    def scale(self) -> float:
        """Factor of the product of the adapters."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted:
    """Parameters with adapters; a model's `apply` and `head_kernel` take them as they take plain ones.

    Attributes:
        base: Parameters of the model, which training leaves alone.
        lora: Adapters; None: they are off, and the model is as it was before training.
        config: What they are; no array, so it is part of the tree's structure.
    """

    base: Params
    lora: Params | None
    config: LoraConfig = dataclasses.field(metadata={"static": True})


def adapt(key: Key, params: Params, config: LoraConfig) -> Adapted:
    """Puts fresh adapters beside parameters; they change nothing before they are trained.

    Args:
        key: Key of the adapters.
        params: Parameters of a decoder or a `ScalarHead`; they are shared, not copied.
        config: What to adapt.

    Raises:
        ValueError: If a target names no layer.

    Example:
        >>> from jaxrl_llm.models import GPT2, GPT2Config
        >>> module = GPT2(GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=2, n_head=2))
        >>> tokens = jnp.array([[3, 1, 4, 1]])
        >>> params = module.init(jax.random.key(0), tokens)["params"]
        >>> adapted = adapt(jax.random.key(1), params, LoraConfig(r=2))
        >>> jax.tree.map(jnp.shape, adapted.lora)
        {'blocks': {'qkv': {'a': (2, 4, 2), 'b': (2, 2, 12)}}}
        >>> logits, _ = module.apply({"params": adapted}, tokens)
        >>> bool((logits == module.apply({"params": params}, tokens)[0]).all())
        True
    """
    return Adapted(params, init_lora(key, params, config), config)


def init_lora(key: Key, params: Params, config: LoraConfig) -> Params:
    """Makes adapters: `a` uniform in ±1 / √in (Kaiming, as in PEFT), `b` zero, `m` as the kernels have it.

    Args:
        key: Key of the adapters.
        params: What they are for; may be `jax.ShapeDtypeStruct`s under `jax.eval_shape`.
        config: What to adapt.

    Raises:
        ValueError: If a target names no layer.
    """
    kernels = _target_kernels(params, config.target_modules)
    pairs = {}
    for path, init_key in zip(kernels, jax.random.split(key, len(kernels)), strict=True):
        layers, inputs, outputs = kernels[path].shape
        bound = inputs**-0.5
        pairs[f"{path}/a"] = jax.random.uniform(init_key, (layers, inputs, config.r), jnp.float32, -bound, bound)
        pairs[f"{path}/b"] = jnp.zeros((layers, config.r, outputs), jnp.float32)
        if config.use_dora:
            pairs[f"{path}/m"] = _column_norms(jnp.asarray(dequantize(kernels[path]), jnp.float32))
    # Copies, for a training step gives the memory of what it trains away.
    whole = {path: jnp.copy(leaf) for path, leaf in _trained_whole(params, config, kernels).items()}
    return traverse_util.unflatten_dict(pairs | whole, sep="/")


def _trained_whole(params: Params, config: LoraConfig, layers: Collection[str]) -> dict[str, Any]:
    """Finds the leaves that are trained themselves beside adapters of these layers: a new head, and biases."""

    def trains(path: str) -> bool:
        layer, _, name = path.rpartition("/")
        biased = config.bias == "all" or (config.bias == "lora_only" and layer in layers)
        return layer == "score" or (name == "bias" and biased)

    return {path: leaf for path, leaf in flat_leaves(params).items() if trains(path)}


def _column_norms(kernel: Array) -> Array:
    """Norms over the inputs, one for each output."""
    return jnp.sqrt(jnp.sum(kernel**2, axis=-2))


def _target_kernels(params: Params, target_modules: Sequence[str]) -> dict[str, Any]:
    """Picks the kernels that the targets name, in the order of the tree."""
    kernels = linear_kernels(params)

    def named(target: str) -> set[str]:
        pattern = re.compile(".*" if target == ALL_LINEAR else target)
        return {path for path in kernels if pattern.fullmatch(path) or pattern.fullmatch(path.rsplit("/", 1)[-1])}

    for target in target_modules:
        if not named(target):
            raise ValueError(
                f"target_modules names no layer with {target!r}. There are {', '.join(kernels)}: give such a path, its "
                f"last part, a regular expression for the whole of either, or {ALL_LINEAR!r}."
            )
    targets = set[str]().union(*map(named, target_modules or DEFAULT_TARGETS))
    return {path: kernel for path, kernel in kernels.items() if path in targets}


class LoraModule(nn.Module):
    """A module that takes `Adapted` and quantised parameters too; the base of every decoder and head."""

    @nn.nowrap
    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the module, as `flax.linen.Module.apply`; `variables["params"]` may be plain, quantised or `Adapted`."""
        params = variables.get("params")
        if not isinstance(params, Adapted):
            if not any(isinstance(leaf, Quantized) for leaf in flat_leaves(params or {}).values()):
                return super().apply(variables, *args, **kwargs)
            params = Adapted(params, None, LoraConfig())
        leaves = flat_leaves(params.lora or {})
        whole = {path: leaf for path, leaf in leaves.items() if path.rsplit("/", 1)[-1] not in PAIR}
        adapters = {path: leaf for path, leaf in leaves.items() if path not in whole}
        base = traverse_util.unflatten_dict(flat_leaves(params.base) | whole, sep="/")
        variables = {**variables, "params": base, "lora": traverse_util.unflatten_dict(adapters, sep="/")}
        dropout = 0.0 if kwargs.get("deterministic", True) else params.config.lora_dropout
        with _adapted_layers(params.config.scale, dropout):
            return super().apply(variables, *args, **kwargs)


@contextlib.contextmanager
def _adapted_layers(scale: float, dropout: float) -> Iterator[None]:
    """Lets each linear layer add what its adapters say; those of a scan or under remat too, for they are traced here."""

    @partial(jax.checkpoint, prevent_cse=False)  # else the backward pass would read kernels that the forward pass keeps
    def multiply(inputs: Array, kernel: Quantized | Array) -> Array:
        return inputs @ dequantize(kernel).astype(inputs.dtype)

    def of_outputs(x: Array, outputs: Array) -> Array:
        return jnp.broadcast_to(x.astype(outputs.dtype), outputs.shape)

    def add(next_fun: Callable, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, nn.Dense):
            return next_fun(*args, **kwargs)
        (inputs,) = args
        kernel = module.get_variable("params", "kernel")
        bias = module.get_variable("params", "bias") if module.has_variable("params", "bias") else jnp.zeros(())
        if isinstance(kernel, Quantized):
            dtype = jnp.promote_types(inputs.dtype, jnp.float32) if module.dtype is None else module.dtype
            outputs = multiply(inputs.astype(dtype), kernel)
            outputs += of_outputs(bias, outputs)
        else:
            outputs = next_fun(inputs)
        if not module.has_variable("lora", "a"):
            return outputs
        inputs = inputs.astype(outputs.dtype)
        if dropout > 0:
            keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - dropout, inputs.shape)
            inputs = jnp.where(keep, inputs / (1 - dropout), 0)
        a, b = (module.get_variable("lora", name) for name in "ab")
        change = scale * ((inputs @ a.astype(outputs.dtype)) @ b.astype(outputs.dtype))
        if not module.has_variable("lora", "m"):
            return outputs + change
        gain = of_outputs(_gain(kernel, a, b, module.get_variable("lora", "m"), scale), outputs)
        # What is rescaled drops out as the change does; where nothing does, it need not be computed again.
        plain = multiply(inputs, kernel) if dropout > 0 else outputs - of_outputs(bias, outputs)
        return outputs + (gain - 1) * plain + gain * change

    with nn.intercept_methods(add):
        yield


def _gain(kernel: Quantized | Array, a: Array, b: Array, magnitude: Array, scale: float) -> Array:
    """Computes DoRA's factor of each output, m / ‖W + s A B‖, whose norm is a constant in the gradient."""
    merged = dequantize(kernel).astype(jnp.float32) + scale * jnp.matmul(a, b, precision="highest")
    return magnitude / jax.lax.stop_gradient(_column_norms(merged))


def merge_lora(params: Params) -> Params:
    """Adds the adapters into the kernels, W + s · A B: plain parameters of the same model, up to rounding.

    Args:
        params: `Adapted` parameters; plain ones are returned as they are.

    Returns:
        Plain parameters; leaves without an adapter are shared, not copied. Adapted and quantised kernels come back in float32.
    """
    if not isinstance(params, Adapted):
        return params
    scale = params.config.scale

    def merge(base: Any, lora: Any) -> Any:
        if not isinstance(lora, Mapping):
            return lora  # trained whole
        if "a" in lora:
            a, b, kernel = lora["a"], lora["b"], dequantize(base["kernel"])
            merged = kernel + scale * jnp.matmul(a, b, precision="highest")
            if "m" in lora:
                merged *= jnp.expand_dims(_gain(kernel, a, b, lora["m"], scale), -2)
            whole = {name: leaf for name, leaf in lora.items() if name not in PAIR}
            return {**base, **whole, "kernel": merged}
        return {**base, **{name: merge(base[name], lora[name]) for name in lora}}

    merged = flat_leaves(merge(params.base, params.lora or {}))
    return traverse_util.unflatten_dict({path: dequantize(leaf) for path, leaf in merged.items()}, sep="/")


def unmerge_lora(params: Params, lora: Params, config: LoraConfig) -> Adapted:
    """Takes adapters out of the kernels that they were merged into, W − s · A B, for a model whose base is lost.

    Args:
        params: What `merge_lora` made.
        lora: The adapters that are in it. Leaves that were trained whole (biases, a new head) stay as they are.
        config: What they are.

    Returns:
        The same model as `Adapted` parameters, up to rounding.

    Raises:
        ValueError: With DoRA, which forgets how long the columns of the base were.
    """
    if config.use_dora:
        raise ValueError(
            "use_dora must be False: a magnitude replaces the norms of the base, which cannot be found again."
        )
    less = {path: -leaf if path.endswith("/b") else leaf for path, leaf in flat_leaves(lora).items()}
    base = merge_lora(Adapted(params, traverse_util.unflatten_dict(less, sep="/"), config))
    return Adapted(base, lora, config)


def split_trainable(params: Params) -> tuple[Params, Adapted | None]:
    """Splits parameters into what is trained and what is not: (adapters, the base with adapters off).

    The second is the reference policy of preference losses and of the KL penalty: no copy of the base is needed. Plain
    parameters are all trained: (params, None).
    """
    if not isinstance(params, Adapted):
        return params, None
    return params.lora, dataclasses.replace(params, lora=None)


def join_trainable(trainable: Params, frozen: Adapted | None) -> Params:
    """Undoes `split_trainable`."""
    return trainable if frozen is None else dataclasses.replace(frozen, lora=trainable)
