"""Settings that several recipes share, with their checks. A recipe's `Config` joins those that it needs.

Values are checked by `validate`, which `run` calls, not in `__post_init__`: a field may hold a traced number.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import optax

from jaxrl_llm.models import LoraConfig
from jaxrl_llm.models.quantization import QuantType
from jaxrl_llm.optimizers import make_optimizer, make_schedule
from jaxrl_llm.optimizers.first_order import WITHOUT_MOMENTUM, OptimizerName, ScheduleName, StateType

Options = TypeVar("Options", bound="ModelOptions")


def require(name: str, value: Any, meant: str, holds: Callable[[Any], bool]) -> None:
    """Raises a `ValueError` that names the option, what came and what was meant, unless `holds(value)`."""
    if not holds(value):
        raise ValueError(f"{name} must be {meant}, got {value!r}.")


def require_at_least(least: int, **options: int) -> None:
    """Checks that each option is a whole number of at least `least`."""
    for name, value in options.items():
        require(name, value, f"a whole number of at least {least}", lambda v: isinstance(v, int) and v >= least)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Where a run writes, how often, and from where it goes on."""

    output_dir: str
    """Folder for metrics, checkpoints and the trained model."""
    seed: int = 0
    """Seed of initialisation, order of the data, dropout and sampling."""
    logging_steps: int = 10
    """Steps between two lines of metrics."""
    eval_steps: int = 100
    """Steps between two evaluations on held-out rows."""
    save_steps: int = 500
    """Steps between two checkpoints; the last step and Ctrl-C save too."""
    save_total_limit: int = 2
    """Checkpoints to keep."""
    resume: bool = False
    """Go on from the newest checkpoint in output_dir, if there is one."""
    overwrite: bool = False
    """Delete the run that output_dir holds already."""

    def validate_run(self) -> None:
        """Checks the values."""
        require("output_dir", self.output_dir, "the name of a folder", bool)
        require_at_least(0, seed=self.seed)
        require_at_least(
            1,
            logging_steps=self.logging_steps,
            eval_steps=self.eval_steps,
            save_steps=self.save_steps,
            save_total_limit=self.save_total_limit,
        )
        require("resume and overwrite", (self.resume, self.overwrite), "not both true", lambda pair: not all(pair))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Whether to train all parameters, or small adapters beside them."""

    lora: bool = False
    """Train low-rank adapters (LoRA) beside the model, which stays as it is; the saved model has them merged in."""
    qlora: bool = False
    """The same beside a model that is held at 4 bits a weight (QLoRA): less memory, more time."""
    quant_type: QuantType = "nf4"
    """How qlora holds the kernels of the blocks: nf4 (4 bits) or int8."""
    use_double_quant: bool = False
    """Hold the scales of quantised blocks at 8 bits too: 4.13 bits a weight instead of 4.5."""
    adapter: str = ""
    """Folder of adapters in PEFT's format, to train on with lora or qlora; else they are merged into the model first."""
    lora_r: int = 8
    """Rank of the adapters."""
    lora_alpha: float = 16.0
    """Scale of what the adapters add, times their rank."""
    lora_dropout: float = 0.0
    """Dropout on the inputs of adapters in training."""
    target_modules: tuple[str, ...] = ()
    """Layers to adapt: names (`query`), expressions for whole paths (`blocks/mlp_.*`), or all-linear; empty: attention."""
    use_rslora: bool = False
    """Divide lora_alpha by the root of the rank, not by the rank."""
    use_dora: bool = False
    """Train a magnitude for each output of an adapted layer too (DoRA)."""
    lora_bias: Literal["none", "lora_only", "all"] = "none"
    """Biases to train besides: none, those of the adapted layers (lora_only), or all."""

    def validate_lora(self) -> None:
        """Checks the values."""
        require_at_least(1, lora_r=self.lora_r)
        require("lora_alpha", self.lora_alpha, "positive", lambda alpha: alpha > 0)
        require("lora_dropout", self.lora_dropout, "in [0, 1)", lambda rate: 0 <= rate < 1)
        names = ("none", "lora_only", "all")
        require("lora_bias", self.lora_bias, f"one of {names}", lambda name: name in names)
        of_qlora = ("quant_type", "use_double_quant")
        for field in dataclasses.fields(LoraOptions):
            name, value = field.name, getattr(self, field.name)
            if name in ("lora", "qlora", "adapter") or value == field.default:
                continue
            switch = "qlora" if name in of_qlora else "lora"
            read = self.qlora if name in of_qlora else self.adapts
            require(
                name,
                value,
                f"{field.default!r} unless {switch} is true: nothing else reads it",
                lambda _, read=read: read,
            )
            meant = f"{field.default!r} with adapter, whose folder says what its adapters are"
            require(name, value, meant, lambda _, name=name: not self.adapter or name in of_qlora)

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained, and not the model."""
        return self.lora or self.qlora

    @property
    def lora_config(self) -> LoraConfig | None:
        """What is adapted; None where all parameters are trained."""
        if not self.adapts:
            return None
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.target_modules,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            bias=self.lora_bias,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions(LoraOptions):
    """Which model to train: a saved one, or a new one."""

    model: str = ""
    """Folder, .gguf file or hub id of a GPT-2, Llama, Mistral or Qwen; empty: a new one of the sizes below."""
    model_type: Literal["gpt2", "llama"] = "gpt2"
    """Architecture of a new model."""
    tokenizer: str = "gpt2"
    """Of a new model: a folder or hub id, `gpt2` (needs no network), or `characters:abc` (a token for each of a, b, c)."""
    n_layer: int = 4
    """Layers of a new model."""
    n_head: int = 4
    """Attention heads of a new model; they divide n_embd."""
    n_embd: int = 256
    """Width of a new model."""
    n_positions: int = 256
    """Longest text of a new model, in tokens."""
    initializer_range: float = 0.02
    """Standard deviation of a new model's weights. 0.02 suits widths near 768; narrow models want more: 0.1 at width 64."""
    tie_word_embeddings: bool = True
    """Whether the head of a new model is its token embedding, as in GPT-2."""
    dropout: float = 0.0
    """Dropout on embeddings, attention and residuals in training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type to compute in; what is trained stays float32, what adapters leave alone is held so. (float16 needs loss scaling.)"""
    remat: bool = False
    """Recompute whole blocks in the backward pass, products with parameters too: less memory, a third more time."""
    chunk_size: int = 128
    """Positions along time whose logits exist at once."""
    mesh: str = ""
    """Devices to divide the run over, such as data=2,fsdp=2,tensor=2 (see jaxrl_llm.training.parallel); empty: one."""

    def validate_model(self) -> None:
        """Checks the values."""
        self.validate_lora()
        meant = "the model that adapter was trained beside"
        require("model", self.model, meant, lambda name: bool(name) or not self.adapter)
        sizes = {name: getattr(self, name) for name in ("n_layer", "n_head", "n_embd", "n_positions", "chunk_size")}
        require_at_least(1, **sizes)
        require("initializer_range", self.initializer_range, "positive", lambda std: std > 0)
        require("dropout", self.dropout, "in [0, 1)", lambda rate: 0 <= rate < 1)

    @property
    def drops_out(self) -> bool:
        """Whether training draws random numbers for dropout."""
        return self.dropout > 0 or (self.adapts and self.lora_dropout > 0)

    def without_dropout(self: Options) -> Options:
        """Sets every dropout to 0, for evaluations."""
        return dataclasses.replace(self, dropout=0.0, lora_dropout=0.0)


class LearningRates(NamedTuple):
    """Peak learning rates by what is trained; adapters want about ten times the rate of the whole model.

    Attributes:
        new: A new model.
        full: All of a saved model.
        adapters: Adapters beside either.
    """

    new: float
    full: float
    adapters: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """How parameters move."""

    learning_rate: float | None = None
    """Peak learning rate; None: what suits what is trained."""
    default_learning_rates: ClassVar = LearningRates(new=1e-3, full=2e-5, adapters=2e-4)
    optim: OptimizerName = "adamw"
    """Optimizer."""
    lr_scheduler_type: ScheduleName = "cosine"
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """Decoupled decay (adamw) or L2 (others), not on biases and norms."""
    adam_beta1: float = 0.9
    """Decay of the mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of the mean of squared gradients."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment."""
    optim_state_dtype: StateType = "float32"
    """Type of the optimizer's mean of gradients; bfloat16: a quarter less state for adamw. Squares stay float32."""
    max_grad_norm: float = 1.0
    """Largest global norm of the gradient."""
    gradient_accumulation_steps: int = 1
    """Parts that each batch is worked through in, one after the other: less memory, the same gradient."""
    skip_nonfinite: bool = True
    """Leave the model as it is where a gradient is not finite (counted in grad_nonfinite)."""

    def validate_optimizer(self) -> None:
        """Checks the values."""
        require_at_least(0, warmup_steps=self.warmup_steps)
        require_at_least(1, gradient_accumulation_steps=self.gradient_accumulation_steps)
        for name in ("peak_learning_rate", "max_grad_norm", "adam_epsilon"):
            require(name.removeprefix("peak_"), getattr(self, name), "positive", lambda value: value > 0)
        require("weight_decay", self.weight_decay, "at least 0", lambda value: value >= 0)
        for name in ("adam_beta1", "adam_beta2"):
            require(name, getattr(self, name), "in [0, 1)", lambda value: 0 <= value < 1)

        meant = f"float32 for {self.optim}, which keeps no mean of gradients"
        kept = self.optim not in WITHOUT_MOMENTUM
        require("optim_state_dtype", self.optim_state_dtype, meant, lambda name: name == "float32" or kept)

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate, or the default for what is trained."""
        if self.learning_rate is not None:
            return self.learning_rate
        rates = self.default_learning_rates
        if isinstance(self, ModelOptions) and self.adapts:
            return rates.adapters
        return rates.full if isinstance(self, ModelOptions) and self.model else rates.new

    def schedule(self, total_steps: int) -> optax.Schedule:
        """Makes the learning rate as a function of the step."""
        if self.lr_scheduler_type != "constant":
            require(
                "warmup_steps",
                self.warmup_steps,
                f"less than {total_steps}, the steps of the run",
                lambda steps: steps < total_steps,
            )
        return make_schedule(
            self.peak_learning_rate,
            lr_scheduler_type=self.lr_scheduler_type,
            warmup_steps=self.warmup_steps,
            total_steps=total_steps,
        )

    def optimizer(self, total_steps: int) -> optax.GradientTransformation:
        """Makes the optimizer of a run of `total_steps`."""
        return make_optimizer(
            self.optim,
            learning_rate=self.schedule(total_steps),
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            adam_beta1=self.adam_beta1,
            adam_beta2=self.adam_beta2,
            adam_epsilon=self.adam_epsilon,
            optim_state_dtype=None if self.optim_state_dtype == "float32" else self.optim_state_dtype,
        )
