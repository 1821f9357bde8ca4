"""LoRA: low-rank adapters beside the kernels of a frozen model.

An adapted layer computes y = x W + s · dropout(x) A B with rank r and s = lora_alpha / r; W stays as it is, and no merged
copy of it is ever made. Adapters are a tree of their own, with the paths of the kernels that they adapt:

    blocks/qkv      a [layers, in, r], b [layers, r, out]
    score/kernel    [hidden, 1], only of a `ScalarHead`: the new head is trained whole

    params = adapt(key, params, LoraConfig(r=8))             # Adapted(base, lora, config)
    logits, _ = module.apply({"params": params}, tokens)     # as with plain parameters: sampling and scoring too
    trainable, frozen = split_trainable(params)              # frozen is also the reference policy: the adapters are off
    loss = loss_fn(join_trainable(trainable, frozen), …)     # differentiate by `trainable`
    save_pretrained(folder, module, merge_lora(params), tokenizer)

References:
    Hu et al., 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; the scale of rsLoRA:
    Kalajdzievski, 2023, arXiv 2312.03732. Names and initial values are those of PEFT.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxrl_llm.types import Key, Params

ALL_LINEAR = "all-linear"
DEFAULT_TARGETS = ("qkv", "query", "value")
"""What is adapted by default: GPT-2's fused projection of queries, keys and values; of Llama, queries and values."""
TRAINED_WHOLE = ("score",)


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

    Raises:
        ValueError: If a number is out of its range.
    """

    r: int = 8
    lora_alpha: int | float = 16
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = ()
    use_rslora: bool = False

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
    """Makes adapters: `a` uniform in ±1 / √in (Kaiming, as in PEFT), `b` zero.

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
    # Copies, for a training step gives the memory of what it trains away.
    return nested_leaves(pairs) | {
        name: jax.tree.map(jnp.copy, params[name]) for name in TRAINED_WHOLE if name in params
    }


def _linear_kernels(params: Params) -> dict[str, Any]:
    """Finds the stacked kernels, by the paths of their layers."""
    leaves = flat_leaves(params).items()
    return {path.removesuffix("/kernel"): leaf for path, leaf in leaves if re.search(r"\bblocks/.*/kernel$", path)}


def flat_leaves(tree: Params) -> dict[str, Any]:
    """Lists the leaves of a tree by their paths."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nested_leaves(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `flat_leaves`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        inner = tree
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = leaf
    return tree


def _target_kernels(params: Params, target_modules: Sequence[str]) -> dict[str, Any]:
    """Picks the kernels that the targets name, in the order of the tree."""
    kernels = _linear_kernels(params)

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
    """A module that takes `Adapted` parameters too; the base of every decoder and head."""

    @nn.nowrap
    def apply(self, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Calls the module, as `flax.linen.Module.apply`; `variables["params"]` may be plain or `Adapted`."""
        params = variables.get("params")
        if not isinstance(params, Adapted):
            return super().apply(variables, *args, **kwargs)
        lora = params.lora or {}
        base = {**params.base, **{name: lora[name] for name in TRAINED_WHOLE if name in lora}}
        adapters = {name: pair for name, pair in lora.items() if name not in TRAINED_WHOLE}
        variables = {**variables, "params": base, "lora": adapters}
        dropout = 0.0 if kwargs.get("deterministic", True) else params.config.lora_dropout
        with _adapted_layers(params.config.scale, dropout):
            return super().apply(variables, *args, **kwargs)


@contextlib.contextmanager
def _adapted_layers(scale: float, dropout: float) -> Iterator[None]:
    """Lets each linear layer add what its adapters say; those of a scan or under remat too, for they are traced here."""

    def add(next_fun: Callable, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        outputs, module = next_fun(*args, **kwargs), context.module
        if context.method_name != "__call__" or not module.has_variable("lora", "a"):
            return outputs
        (inputs,) = args
        inputs = inputs.astype(outputs.dtype)
        if dropout > 0:
            keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - dropout, inputs.shape)
            inputs = jnp.where(keep, inputs / (1 - dropout), 0)
        a, b = (module.get_variable("lora", name).astype(outputs.dtype) for name in "ab")
        return outputs + scale * ((inputs @ a) @ b)

    with nn.intercept_methods(add):
        yield


def merge_lora(params: Params) -> Params:
    """Adds the adapters into the kernels, W + s · A B: plain parameters of the same model, up to rounding.

    Args:
        params: `Adapted` parameters; plain ones are returned as they are.

    Returns:
        Plain parameters; leaves without an adapter are shared, not copied.
    """
    if not isinstance(params, Adapted):
        return params
    scale = params.config.scale

    def merge(base: Any, lora: Any) -> Any:
        if not isinstance(lora, Mapping):
            return lora  # trained whole
        if "a" in lora:
            change = jnp.matmul(lora["a"], lora["b"], precision="highest")
            return {**base, "kernel": (base["kernel"] + scale * change).astype(base["kernel"].dtype)}
        return {**base, **{name: merge(base[name], lora[name]) for name in lora}}

    return merge(params.base, params.lora or {})


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
