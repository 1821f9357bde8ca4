"""TRL's own loss methods, executed on logits that are given: no formula stands here, only what TRL asks for around them.

Each function makes an instance of a trainer without running its constructor, sets the attributes that its loss method
reads, and calls the method with a model that returns the given logits. Needs the `parity` extra.
"""

import __future__

import ast
import contextlib
import functools
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_pt_utils import LabelSmoother
from trl import DPOTrainer, GRPOConfig, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.gmpo import GMPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.kernels.chunked_logprob import OPTIONAL_OUTPUTS, ChunkedLogProbFunction
from trl.trainer.utils import FusedCausalLMOutput

PROMPT = 2
"""Tokens of each prompt; the response follows, then padding."""
BETA = 0.1
IGNORED = -100

BCO_WHEEL = "trl==1.12.0 --hash=sha256:9c8f117b21a941edbc85744f5a341c9453d38e81f24ae81d3c6e9b9ca3b96409"
"""The last releases of TRL have no BCO; this one has."""


class Batch(NamedTuple):
    """Rows of prompt, response, and padding; for losses of pairs the first half is the chosen of the second.

    Attributes:
        tokens: `[rows, time]`.
        lengths: Tokens of each response, `[rows]`.
        labels: Whether each response is desirable, `[rows]`.
        advantages: `[rows]`.
        margins: By how much each chosen response should win, `[pairs]`.
        kernel: Head of a language model, `[vocab, vocab]`: where hidden states are asked for, logits serve as such.
        policy: Logits `[rows, time, vocab]` of the policy; the loss is differentiated with respect to them.
        old: Those of the policy that sampled.
        reference: Those of the reference, or the teacher.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    advantages: np.ndarray
    margins: np.ndarray
    kernel: np.ndarray
    policy: np.ndarray
    old: np.ndarray
    reference: np.ndarray


class Executed(NamedTuple):
    """What a loss gave.

    Attributes:
        loss: The loss.
        gradient: With respect to the policy's logits.
    """

    loss: float
    gradient: np.ndarray


class Model(torch.nn.Module):
    """Returns the logits that it was made with, whatever the tokens; scored as TRL's fused head does it."""

    def __init__(self, logits: np.ndarray, dtype: torch.dtype, temperature: float = 1.0):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits, dtype=dtype))
        self.temperature = temperature
        self.is_gradient_checkpointing = False
        self.config = SimpleNamespace()

    def forward(self, *_: Any, labels: torch.Tensor | None = None, fused_lm_head: bool = False, **__: Any) -> Any:
        """Scores the labels, or returns the logits, as a model with a fused head does."""
        if not fused_lm_head:
            return CausalLMOutput(logits=self.logits.clone())
        logits, labels = self.logits[:, :-1] / self.temperature, labels[:, 1:]
        mask = labels != IGNORED
        log_softmax = logits.log_softmax(-1)
        targets = labels.clamp(min=0)[..., None]
        fields = {
            "log_probs": log_softmax.gather(-1, targets)[..., 0],
            "entropy": -(log_softmax.exp() * log_softmax).sum(-1),
            "log_sum_sq_probs": (2 * log_softmax).logsumexp(-1).detach(),
            "mean_logits": logits.mean(-1).detach(),
            "is_top1": logits.argmax(-1) == targets[..., 0],
        }
        return FusedCausalLMOutput(**{name: x.masked_fill(~mask, 0) for name, x in fields.items()}, label_mask=mask)


class Accelerator:
    """One process on CPU."""

    device, num_processes, sync_gradients, is_main_process = torch.device("cpu"), 1, True, True
    parallelism_config, use_distributed = None, False
    autocast = staticmethod(contextlib.nullcontext)

    def gather(self, x: Any) -> Any:
        """Returns what the one process has."""
        return x

    gather_for_metrics = gather

    def reduce(self, x: Any, reduction: str = "sum") -> Any:
        """Returns what the one process has."""
        return x

    def pad_across_processes(self, x: Any, dim: int = 0, pad_index: int = 0) -> Any:
        """Returns what the one process has."""
        return x


def _trainer(cls: type, **attributes: Any) -> Any:
    trainer = object.__new__(cls)
    common = {"accelerator": Accelerator(), "aux_loss_enabled": False, "_tp_size": 1, "_total_train_tokens": 0}
    trainer.__dict__ |= common | {"_metrics": {"train": defaultdict(list)}} | attributes
    return trainer


def _executed(loss: torch.Tensor, model: Model) -> Executed:
    loss.backward()
    return Executed(loss.item(), model.logits.grad.double().numpy())


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    position = np.arange(batch.tokens.shape[1])
    real = position < PROMPT + batch.lengths[:, None]
    return {
        "input_ids": torch.tensor(batch.tokens),
        "attention_mask": torch.tensor(real).long(),
        "completion_mask": torch.tensor(real & (position >= PROMPT)).long(),
    }


def dpo(batch: Batch, dtype: torch.dtype, *, loss_type: str | tuple = "sigmoid", **options: Any) -> Executed:
    """Executes `DPOTrainer._compute_loss`."""
    policy, reference = Model(batch.policy, dtype), Model(batch.reference, dtype)
    loss_types = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    settings = {
        "loss_weights": [1.0] * len(loss_types),
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
    } | options
    args = SimpleNamespace(discopop_tau=settings.pop("discopop_tau", 0.05), gradient_checkpointing_kwargs=None)
    models = {"model": policy, "ref_model": reference, "precompute_ref_logps": False}
    trainer = _trainer(DPOTrainer, args=args, beta=BETA, loss_types=loss_types, **models, **settings)
    return _executed(trainer._compute_loss(policy, _tensors(batch), False), policy)


def kto(
    batch: Batch,
    dtype: torch.dtype,
    *,
    loss_type: str = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Executed:
    """Executes `KTOTrainer._compute_loss`; the reference point is that of responses rolled by one row."""
    policy, reference = Model(batch.policy, dtype), Model(batch.reference, dtype)
    inputs = _tensors(batch)
    rolled = inputs["input_ids"].clone()
    rolled[:, PROMPT:] = inputs["input_ids"].roll(1, 0)[:, PROMPT:]
    inputs |= {
        "label": torch.tensor(batch.labels),
        "KL_input_ids": rolled,
        "KL_attention_mask": inputs["attention_mask"].roll(1, 0),
        "KL_completion_mask": inputs["completion_mask"].roll(1, 0),
    }
    trainer = _trainer(
        KTOTrainer,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        model=policy,
        ref_model=reference,
        precompute_ref_logps=False,
        calculate_KL=loss_type == "kto",
        beta=BETA,
        loss_type=loss_type,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    return _executed(trainer._compute_loss(policy, inputs, False), policy)


def _pairs(batch: Batch) -> dict[str, torch.Tensor]:
    tensors, pairs = _tensors(batch), len(batch.tokens) // 2
    labels = tensors["input_ids"].masked_fill(tensors["completion_mask"] == 0, IGNORED)
    fields = {"input_ids": tensors["input_ids"], "attention_mask": tensors["attention_mask"], "labels": labels}
    sides = {"chosen": slice(None, pairs), "rejected": slice(pairs, None)}
    return {f"{side}_{name}": x[rows] for side, rows in sides.items() for name, x in fields.items()}


def orpo(batch: Batch, dtype: torch.dtype) -> Executed:
    """Executes `ORPOTrainer.get_batch_loss_metrics`."""
    model = Model(batch.policy, dtype)
    trainer = _trainer(ORPOTrainer, beta=BETA, is_encoder_decoder=False, padding_value=0)
    return _executed(trainer.get_batch_loss_metrics(model, _pairs(batch))[0], model)


def cpo(batch: Batch, dtype: torch.dtype, **options: Any) -> Executed:
    """Executes `CPOTrainer.get_batch_loss_metrics`."""
    model = Model(batch.policy, dtype)
    settings = {"loss_type": "sigmoid", "label_smoothing": 0.0, "simpo_gamma": 0.5, "alpha": 0.0, "cpo_alpha": 0.0}
    encoder_decoder = {"is_encoder_decoder": False, "pad_token_id": 0}
    trainer = _trainer(CPOTrainer, beta=BETA, **encoder_decoder, **settings | options)
    return _executed(trainer.get_batch_loss_metrics(model, _pairs(batch))[0], model)


def bco(batch: Batch, dtype: torch.dtype) -> Executed:
    """Executes `BCOTrainer.bco_loss` on the second half, after its running mean has seen the first."""
    running_moments, bco_loss = _older_bco()
    policy, reference = Model(batch.policy, dtype), Model(batch.reference, dtype)
    tensors = _tensors(batch)
    labels = tensors["input_ids"].masked_fill(tensors["completion_mask"] == 0, IGNORED)
    sums = [model(labels=labels, fused_lm_head=True).log_probs.sum(-1) for model in (policy, reference)]
    desirable, running = torch.tensor(batch.labels), running_moments(Accelerator())
    half = len(batch.tokens) // 2
    running.update((BETA * (sums[0] - sums[1]))[:half].detach())
    sides = [desirable[half:], ~desirable[half:]]
    arguments = [log_probs[half:][side] for log_probs in sums for side in sides]
    trainer = SimpleNamespace(beta=BETA, running=running, match_underlying_distribution=False)
    return _executed(bco_loss(trainer, *arguments, None, None)[0].mean(), policy)


@functools.cache
def _older_bco() -> tuple[type, Callable]:
    """Fetches a release that has BCO, and compiles its running mean and its loss: their lines, without their module."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(BCO_WHEEL)
        download = ["download", "--quiet", "--no-deps", "--dest", folder, "--requirement", str(requirements)]
        subprocess.run([sys.executable, "-m", "pip", *download], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        source = zipfile.ZipFile(wheel).read("trl/experimental/bco/bco_trainer.py").decode()
    named = {getattr(node, "name", None): node for node in ast.walk(ast.parse(source))}
    lines = ast.Module([named["RunningMoments"], named["bco_loss"]], type_ignores=[])
    names = {"__name__": __name__, "torch": torch, "F": torch.nn.functional, "dataclass": dataclass}
    exec(compile(lines, "bco_trainer.py", "exec", flags=__future__.annotations.compiler_flag), names)  # type: ignore
    return names["RunningMoments"], names["bco_loss"]  # type: ignore


def gkd(batch: Batch, dtype: torch.dtype, *, beta: float, temperature: float = 1.0) -> Executed:
    """Executes `GKDTrainer.generalized_jsd_loss` over the responses."""
    model = Model(batch.policy, dtype)
    labels = torch.where(_tensors(batch)["completion_mask"] == 1, 0, IGNORED)[:, PROMPT:]
    teacher = torch.tensor(batch.reference, dtype=dtype)[:, PROMPT - 1 : -1]
    options = {"beta": beta, "temperature": temperature, "num_items_in_batch": (labels == 0).sum()}
    student = model.logits[:, PROMPT - 1 : -1]
    return _executed(GKDTrainer.generalized_jsd_loss(student, teacher, labels, **options), model)


def sft(batch: Batch, dtype: torch.dtype, *, loss_type: str = "nll", label_smoothing: float = 0.0) -> Executed:
    """Executes `SFTTrainer.compute_loss` over the responses."""
    model, inputs = Model(batch.policy, dtype), _tensors(batch)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs.pop("completion_mask") == 0, IGNORED)
    trainer = _trainer(
        SFTTrainer,
        args=SimpleNamespace(loss_type=loss_type, average_tokens_across_devices=False),
        model=model,
        compute_loss_func=None,
        label_smoother=LabelSmoother(label_smoothing) if label_smoothing else None,
    )
    return _executed(trainer.compute_loss(model, inputs), model)


class RewardModel(Model):
    """Reads its first logit as the reward of a row."""

    def forward(self, **_: Any) -> Any:
        """Returns rewards."""
        return SimpleNamespace(logits=self.logits[:, 0, :1])


def reward(batch: Batch, dtype: torch.dtype, *, margin: bool = False, center: float | None = None) -> Executed:
    """Executes `RewardTrainer.compute_loss`; the rewards are the policy's first logit of each row."""
    model, inputs = RewardModel(batch.policy, dtype), _tensors(batch)
    if margin:
        inputs["margin"] = torch.tensor(batch.margins, dtype=dtype)
    trainer = _trainer(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=center), model=model)
    return _executed(trainer.compute_loss(model, inputs), model)


def grpo(
    batch: Batch,
    dtype: torch.dtype,
    *,
    loss_type: str = "dapo",
    level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
    temperature: float = 1.0,
    max_completion_length: int = 10,
    on_policy: bool = False,
    use_bias_correction_kl: bool = False,
    top_entropy_quantile: float = 1.0,
    off_policy_mask_threshold: float | None = None,
    corrected: bool = False,
) -> Executed:
    """Executes `GRPOTrainer._compute_loss`, or that of GMPO; `corrected` is for a sampler that was the reference."""
    policy, tensors = Model(batch.policy, dtype, temperature), _tensors(batch)
    ids, mask = tensors["input_ids"], tensors["completion_mask"][:, PROMPT:]

    def log_probs(logits: np.ndarray) -> torch.Tensor:
        scored = Model(logits, dtype, temperature)(labels=ids, fused_lm_head=True).log_probs
        return scored[:, PROMPT - 1 :].detach()

    inputs = {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": torch.ones_like(ids[:, :PROMPT]),
        "completion_ids": ids[:, PROMPT:],
        "completion_mask": mask,
        "advantages": torch.tensor(batch.advantages, dtype=dtype),
        "num_items_in_batch": mask.sum().to(dtype),
        "ref_per_token_logps": log_probs(batch.reference),
    }
    if not on_policy:
        inputs["old_per_token_logps"] = log_probs(batch.old)
    if corrected:  # As the trainer does before the loss, in its mode `token_truncate`.
        gap = (inputs["old_per_token_logps"] - inputs["ref_per_token_logps"]) * mask
        inputs["importance_sampling_ratio"] = gap.exp().clamp(max=3.0)
    defaults = {
        name: field.default
        for name, field in GRPOConfig.__dataclass_fields__.items()
        if name.startswith(("sapo_", "vespo_"))
    }
    settings = {"delta": delta, "use_bias_correction_kl": use_bias_correction_kl, "steps_per_generation": 1}
    trainer = _trainer(
        GMPOTrainer if loss_type == "gmpo" else GRPOTrainer,
        args=SimpleNamespace(**settings, **defaults),
        model=policy,
        top_entropy_quantile=top_entropy_quantile,
        off_policy_mask_threshold=off_policy_mask_threshold,
        vllm_importance_sampling_correction=corrected,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=epsilon,
        epsilon_high=epsilon if epsilon_high is None else epsilon_high,
        use_vllm=corrected,
        current_gradient_accumulation_steps=1,
        max_completion_length=max_completion_length,
        _entropy_bonus_enabled=entropy_coef != 0,
        use_adaptive_entropy=False,
        entropy_coef=entropy_coef,
    )
    # Without the decorator, which reports times.
    score = GRPOTrainer._get_per_token_logps_and_entropies.__wrapped__
    trainer._get_per_token_logps_and_entropies = functools.partial(score, trainer)
    trainer.get_high_entropy_mask = functools.partial(GRPOTrainer.get_high_entropy_mask, trainer)
    return _executed(trainer._compute_loss(policy, inputs), policy)


def rloo(batch: Batch, dtype: torch.dtype, *, epsilon: float = 0.2, epsilon_high: float | None = None) -> Executed:
    """Executes `RLOOTrainer._compute_loss`."""
    policy, tensors = Model(batch.policy, dtype), _tensors(batch)
    ids, mask = tensors["input_ids"], tensors["completion_mask"][:, PROMPT:]
    old = Model(batch.old, dtype)(labels=ids, fused_lm_head=True).log_probs[:, PROMPT - 1 :].detach()
    inputs = {
        "prompt_ids": ids[:, :PROMPT],
        "prompt_mask": torch.ones_like(ids[:, :PROMPT]),
        "completion_ids": ids[:, PROMPT:],
        "completion_mask": mask,
        "advantages": torch.tensor(batch.advantages, dtype=dtype),
        "old_logps": (old * mask).sum(1),
    }
    high = epsilon if epsilon_high is None else epsilon_high
    trainer = _trainer(RLOOTrainer, model=policy, epsilon_low=epsilon, epsilon_high=high)
    score = RLOOTrainer._get_per_token_logps_and_entropies.__wrapped__
    trainer._get_per_token_logps_and_entropies = functools.partial(score, trainer)
    return _executed(trainer._compute_loss(policy, inputs), policy)


def fused_head(batch: Batch, dtype: torch.dtype, *, temperature: float = 1.0) -> Executed:
    """Executes the chunked head that TRL's trainers score with (it computes in float32): a sum of all that it gives."""
    hidden = Model(batch.policy, dtype)
    kernel = torch.tensor(batch.kernel, dtype=dtype)
    targets, rest = torch.tensor(batch.tokens).reshape(-1), (4, None, 1.0, OPTIONAL_OUTPUTS)
    states = hidden.logits.reshape(-1, hidden.logits.shape[-1])
    *statistics, _ = ChunkedLogProbFunction.apply(states, kernel.T.contiguous(), None, targets, temperature, *rest)
    coefficients = torch.tensor(batch.advantages, dtype=dtype)[:, None]
    rows = sum(statistics).reshape(batch.tokens.shape)
    return _executed((coefficients * rows).mean(), hidden)
