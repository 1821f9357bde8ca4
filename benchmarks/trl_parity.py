"""Our losses against TRL's, executed: both on the same random batches, ours in float32, TRL's in float64.

    python -m benchmarks.trl_parity [--batches 20]

writes results/trl_parity.md and results/trl_parity.json. Needs the `parity` extra; the tests marked `parity` run the same
comparisons on fewer batches.

Every loss is computed from logits: TRL's trainer scores them and reduces (`trl_executed`), and so do we. Errors are
relative. A loss that sums terms of both signs may be much smaller than its terms, and then even the last digit of these is
a large part of it: beside the plain error stands that relative to the sum of the sizes of the terms.
"""

import argparse
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import results
from jaxrl_llm import xla_cpu

xla_cpu.set_flag()  # Before jax starts, and before the library looks for it.

from jaxrl_llm import losses
from jaxrl_llm.log_probs import TokenStatistics, chunked_token_statistics, token_log_probs, token_statistics
from jaxrl_llm.losses.group_relative import grpo_weights
from jaxrl_llm.losses.preference import SORTED, dpo_weights
from jaxrl_llm.losses.unpaired import RunningMean, UnpairedWeights
from jaxrl_llm.reductions import row_weights, token_weights

ROWS, PROMPT, RESPONSE, VOCAB = 8, 2, 9, 13
BETA, MAX_COMPLETION_LENGTH = 0.1, 10


def make_batch(seed: int) -> Any:
    """Makes a batch of `trl_executed.Batch`, rounded to float32: responses of 1 to 9 tokens, labels of both kinds."""
    from benchmarks.trl_executed import Batch

    rng = np.random.default_rng(seed)
    shape = ROWS, PROMPT + RESPONSE
    policy, kernel = rng.normal(scale=2, size=(*shape, VOCAB)), rng.normal(size=(VOCAB, VOCAB))
    old, reference = (policy + rng.normal(scale=scale, size=policy.shape) for scale in (0.3, 0.7))
    floats = rng.normal(size=ROWS), rng.uniform(size=ROWS // 2), kernel, policy, old, reference
    return Batch(
        rng.integers(0, VOCAB, shape),
        rng.integers(1, RESPONSE + 1, ROWS),
        np.tile(rng.permutation(ROWS // 2) % 2 == 0, 2),
        *(x.astype(np.float32) for x in floats),
    )


# Ours, from logits. `weights` is what each makes from the whole batch, so that the terms can be told apart.


def mask_of(batch: Any) -> jax.Array:
    """Makes the mask of the responses, in the precision that weights shall have."""
    return (jnp.arange(RESPONSE)[None] < batch.lengths[:, None]).astype(batch.policy.dtype)


def respond(logits: jax.Array, tokens: jax.Array, temperature: float = 1.0) -> TokenStatistics:
    return token_statistics(logits[:, PROMPT - 1 : -1], tokens[:, PROMPT:], temperature=temperature)


def halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x[: ROWS // 2], x[ROWS // 2 :]


def our_dpo(
    logits: jax.Array, batch: Any, weights: Any, *, ld_alpha: float = 1.0, use_weighting: bool = False, **options: Any
) -> jax.Array:
    statistics, mask = respond(logits, batch.tokens), mask_of(batch)
    chosen_lengths, rejected_lengths = halves(batch.lengths)
    shared = {"ld_alpha": ld_alpha, "shared_lengths": jnp.tile(jnp.minimum(chosen_lengths, rejected_lengths), 2)}
    policy = losses.sequence_log_probs(statistics.log_probs, mask, **shared)
    reference = losses.sequence_log_probs(respond(batch.reference, batch.tokens).log_probs, mask, **shared)
    if use_weighting:
        chosen, rejected = halves(losses.wpo_weights(statistics.log_probs, statistics.log_sum_sq_probs, mask))
        options["pair_weights"] = chosen * rejected
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    pairs = *halves(policy), *halves(reference)
    if "sft" in options.get("loss_type", ()):
        options["chosen_log_probs"], _ = halves(losses.sequence_log_probs(statistics.log_probs, mask))
    return losses.dpo_loss(*pairs, beta=BETA, weights=weights, **lengths, **options)[0]


def our_kto(logits: jax.Array, batch: Any, weights: UnpairedWeights, **options: Any) -> jax.Array:
    mask, rolled = mask_of(batch), batch.tokens.at[:, PROMPT:].set(jnp.roll(batch.tokens, 1, 0)[:, PROMPT:])

    def log_probs(logits: jax.Array, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        return losses.sequence_log_probs(respond(logits, tokens).log_probs, mask)

    both = logits, batch.reference
    kl = losses.kto_kl(*(log_probs(x, rolled, jnp.roll(mask, 1, 0)) for x in both))
    sums = (log_probs(x, batch.tokens, mask) for x in both)
    return losses.kto_loss(*sums, batch.labels, beta=BETA, kl=kl, weights=weights, **options)[0]


def our_bco(logits: jax.Array, batch: Any, weights: UnpairedWeights) -> jax.Array:
    mask, (_, labels) = mask_of(batch), halves(batch.labels)
    policy, reference = (
        losses.sequence_log_probs(respond(x, batch.tokens).log_probs, mask) for x in (logits, batch.reference)
    )
    running = RunningMean(jnp.zeros(()), jnp.zeros(()))
    for rewards in halves(BETA * (policy - reference)):
        running = losses.update_running_mean(running, rewards)
    sums = halves(policy)[1], halves(reference)[1]
    return losses.bco_loss(*sums, labels, beta=BETA, delta=running.mean, weights=weights)[0]


def averaged(statistics: TokenStatistics, batch: Any) -> tuple[jax.Array, jax.Array]:
    return halves(losses.sequence_log_probs(statistics.log_probs, mask_of(batch)) / batch.lengths)


def our_orpo(logits: jax.Array, batch: Any, weights: tuple[jax.Array, jax.Array]) -> jax.Array:
    rows, tokens = weights
    pairs = averaged(respond(logits, batch.tokens), batch)
    log_probs, _ = halves(token_log_probs(logits[:, :-1], batch.tokens[:, 1:]))  # the prompt too
    nll, _ = losses.cross_entropy_loss(log_probs, tokens, weights=tokens)
    return losses.orpo_loss(*pairs, nll, beta=BETA, weights=rows)[0]


def orpo_weights(batch: Any) -> tuple[jax.Array, jax.Array]:
    lengths, _ = halves(batch.lengths)
    real = jnp.arange(1, PROMPT + RESPONSE)[None] < PROMPT + lengths[:, None]
    return row_weights(lengths), token_weights(real.astype(batch.policy.dtype), "token_mean")


def our_cpo(logits: jax.Array, batch: Any, weights: tuple[jax.Array, jax.Array], **options: Any) -> jax.Array:
    rows, tokens = weights
    statistics = respond(logits, batch.tokens)
    pairs = halves(losses.sequence_log_probs(statistics.log_probs, mask_of(batch)))
    if options.get("loss_type") in ("ipo", "simpo"):
        pairs = averaged(statistics, batch)
    nll, _ = losses.cross_entropy_loss(halves(statistics.log_probs)[0], tokens, weights=tokens)
    return losses.cpo_loss(*pairs, nll=nll, beta=BETA, weights=rows, **options)[0]


def cpo_weights(batch: Any) -> tuple[jax.Array, jax.Array]:
    return row_weights(batch.lengths[: ROWS // 2]), token_weights(halves(mask_of(batch))[0], "token_mean")


def our_gkd(logits: jax.Array, batch: Any, weights: jax.Array, **options: Any) -> jax.Array:
    both = (x[:, PROMPT - 1 : -1] for x in (logits, batch.reference))
    return losses.distillation_loss(*both, mask_of(batch), weights=weights, **options)[0]


def our_sft(logits: jax.Array, batch: Any, weights: jax.Array, **options: Any) -> jax.Array:
    statistics = respond(logits, batch.tokens)
    scored = {"statistics": statistics, "weights": weights}
    return losses.cross_entropy_loss(statistics.log_probs, mask_of(batch), **scored, **options)[0]


def our_reward(
    logits: jax.Array, batch: Any, weights: jax.Array, *, margin: bool = False, center: float = 0.0
) -> jax.Array:
    rewards = halves(logits[:, 0, 0])
    options = {"margin": batch.margins if margin else None, "center_rewards_coefficient": center}
    return losses.reward_model_loss(*rewards, **options, weights=weights)[0]


def our_grpo(
    logits: jax.Array,
    batch: Any,
    weights: Any,
    *,
    level: str = "token",
    temperature: float = 1.0,
    on_policy: bool = False,
    corrected: bool = False,
    top_entropy_quantile: float = 1.0,
    **options: Any,
) -> jax.Array:
    policy, old, reference = (respond(x, batch.tokens, temperature) for x in (logits, batch.old, batch.reference))
    mask = mask_of(batch)
    if corrected:
        pair = old.log_probs, reference.log_probs
        options["correction"] = losses.importance_correction(*pair, mask, mode="token_truncate")
    if top_entropy_quantile != 1:
        options["entropy_mask"] = losses.top_entropy_mask(policy.entropy, mask, top_entropy_quantile)
    return losses.grpo_loss(
        policy.log_probs,
        None if on_policy else old.log_probs,
        batch.advantages,
        mask,
        ref_log_probs=reference.log_probs,
        entropy=policy.entropy,
        importance_sampling_level=level,
        weights=weights,
        **options,
    )[0]


def our_rloo(logits: jax.Array, batch: Any, weights: Any, **options: Any) -> jax.Array:
    policy, old = (respond(x, batch.tokens) for x in (logits, batch.old))
    fields = policy.log_probs, old.log_probs, batch.advantages, mask_of(batch)
    return losses.rloo_loss(*fields, weights=weights, **options)[0]


def our_fused_head(logits: jax.Array, batch: Any, weights: jax.Array, **options: Any) -> jax.Array:
    """A sum of all statistics of a head's logits, where `logits` stands for hidden states."""
    given = chunked_token_statistics(logits, batch.kernel, batch.tokens, chunk_size=4, **options)
    constant = jax.lax.stop_gradient(given.log_sum_sq_probs + given.mean_log_probs + given.logsumexp)
    return jnp.sum(weights * (given.log_probs + given.entropy + constant))


# The cases


class Case(NamedTuple):
    """One loss with its options.

    Attributes:
        loss: Name of the loss, and of the function in `trl_executed`.
        ours: `(logits, batch, weights, **options) -> loss`.
        weights: `batch -> weights`, or None for a loss that sorts the whole batch.
        options: By the names that both sides know.
        trl_precision: What TRL computes in: float64 where it can.
    """

    loss: str
    ours: Callable
    weights: Callable | None
    options: dict[str, Any]
    trl_precision: str = "float64"

    @property
    def name(self) -> str:
        """The loss and its options, in words."""
        return " ".join([self.loss, *(f"{name}={_words(value)}" for name, value in self.options.items())])


def _words(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _dpo_cases() -> Iterable[Case]:
    plain = ("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "sft")
    rows: list[dict[str, Any]] = [{"loss_type": name} for name in (*plain, "sigmoid_norm", "aot", "aot_unpaired")]
    rows += [{"loss_type": "exo_pair", "label_smoothing": smoothing} for smoothing in (1e-3, 0.1)]
    rows += [{"loss_type": name, "label_smoothing": 0.1} for name in ("robust", "aot", "aot_unpaired")]
    rows += [{"loss_type": "discopop", "discopop_tau": 0.5}]
    for divergence in ("forward_kl", "js_divergence"):
        rows += [{"loss_type": name, "f_divergence_type": divergence} for name in ("sigmoid", "ipo", "hinge")]
    rows += [
        {"loss_type": "sigmoid", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
        for alpha in (0.5, 1.0, 1.5)
    ]
    rows += [{"loss_type": name, "ld_alpha": alpha} for name, alpha in (("sigmoid", 0.5), ("ipo", 0.0), ("sft", 0.5))]
    rows += [{"loss_type": name, "use_weighting": True} for name in ("sigmoid", "bco_pair")]
    rows += [{"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)}]
    for row in rows:
        sorts = row["loss_type"] in SORTED
        weights = None if sorts else lambda batch: dpo_weights(halves(batch.lengths)[0])
        # TRL casts the label smoothing of EXO, and knows no float64 for the alpha divergence.
        precision = "both" if row["loss_type"] == "exo_pair" else "float64"
        if row.get("f_divergence_type") == "alpha_divergence":
            precision = "float32"
        yield Case("dpo", our_dpo, weights, row, precision)


def _other_cases() -> Iterable[Case]:
    def unpaired(batch: Any) -> UnpairedWeights:
        return losses.unpaired_weights(batch.labels)

    def of_tokens(batch: Any) -> jax.Array:
        return token_weights(mask_of(batch), "token_mean")

    kto_rows = [{}, {"desirable_weight": 1.33, "undesirable_weight": 0.8}, {"loss_type": "apo_zero_unpaired"}]
    yield from (Case("kto", our_kto, unpaired, row) for row in kto_rows)
    yield Case("bco", our_bco, lambda batch: losses.unpaired_weights(halves(batch.labels)[1]), {}, "both")
    yield Case("orpo", our_orpo, orpo_weights, {}, "both")
    cpo_rows = [
        *({"loss_type": name} for name in ("sigmoid", "hinge", "ipo", "simpo")),
        *({"loss_type": "sigmoid", "label_smoothing": 0.1, "cpo_alpha": alpha} for alpha in (0.5, 1.0)),
        {"loss_type": "simpo", "simpo_gamma": 1.0, "cpo_alpha": 0.5},
        *({"loss_type": "simpo", "alpha": alpha} for alpha in (0.25, -0.25)),
    ]
    yield from (Case("cpo", our_cpo, cpo_weights, row) for row in cpo_rows)
    gkd_rows = [{"beta": 0.5, "temperature": 2.0}, *({"beta": beta} for beta in (0.0, 0.1, 0.5, 0.9, 1.0))]
    yield from (Case("gkd", our_gkd, of_tokens, row) for row in gkd_rows)
    yield from (Case("sft", our_sft, of_tokens, {"loss_type": name}) for name in ("nll", "dft"))
    yield Case("sft", our_sft, of_tokens, {"label_smoothing": 0.1}, "both")
    reward_rows = [{}, {"margin": True}, {"center": 0.01}]
    yield from (Case("reward", our_reward, lambda batch: row_weights(batch.margins), row) for row in reward_rows)
    for row in ({}, {"temperature": 0.7}):
        yield Case("fused_head", our_fused_head, lambda batch: _repeated(batch.advantages), row, "float32")


def _repeated(rows: jax.Array) -> jax.Array:
    """Makes the weights of a mean over all tokens, each times the number of its row."""
    time = PROMPT + RESPONSE
    return jnp.repeat(rows[:, None], time, axis=1) / (ROWS * time)


def _grpo_cases() -> Iterable[Case]:
    every = [{"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo")]
    rows = [
        *every,
        *(row | {"level": "sequence"} for row in every),
        *(row | {"beta": 0.04} for row in every),
        *(row | {"entropy_coef": 0.01} for row in every),
        {"loss_type": "grpo", "level": "sequence", "epsilon": 0.03},
        {"loss_type": "dapo", "epsilon": 0.05},
        {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28},
        {"loss_type": "dapo", "epsilon": 0.05, "delta": 1.1},
        {"loss_type": "grpo", "temperature": 0.7},
        {"loss_type": "dapo", "on_policy": True},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        *({"loss_type": name} for name in ("sapo", "vespo")),
        {"loss_type": "sapo", "level": "sequence"},
        *({"loss_type": "luspo", "level": "sequence"} | row for row in ({}, {"beta": 0.04})),
        *({"loss_type": "gmpo", "epsilon": epsilon} for epsilon in (0.4, 0.08)),
        {"loss_type": "gmpo", "epsilon": 0.4, "beta": 0.04, "top_entropy_quantile": 0.4},
        *(row | {"beta": 0.04, "use_bias_correction_kl": True} for row in every[:2]),
        {"loss_type": "dapo", "top_entropy_quantile": 0.2},
        {"loss_type": "grpo", "beta": 0.04, "off_policy_mask_threshold": 0.0},
        {"loss_type": "dapo", "beta": 0.04, "corrected": True},
        {"loss_type": "vespo", "corrected": True},
    ]
    for row in rows:
        row |= {"max_completion_length": MAX_COMPLETION_LENGTH} if row["loss_type"] == "dr_grpo" else {}

        def weights(batch: Any, row: dict = row) -> Any:
            return grpo_weights(mask_of(batch), row["loss_type"], max_completion_length=MAX_COMPLETION_LENGTH)

        # TRL picks the temperature of SAPO in float32.
        yield Case("grpo", our_grpo, weights, row, "both" if row["loss_type"] == "sapo" else "float64")
    for row in ({}, {"epsilon": 0.05}, {"epsilon_high": 0.5}):
        yield Case("rloo", our_rloo, lambda batch: losses.rloo_weights(mask_of(batch)), row)


CASES = {case.name: case for case in (*_dpo_cases(), *_other_cases(), *_grpo_cases())}

# Comparing


class Difference(NamedTuple):
    """The largest relative errors over some batches.

    Attributes:
        loss: Relative to TRL's loss.
        terms: Relative to the sum of the sizes of the loss's terms.
        gradient: Norm of the difference, relative to the norm of TRL's gradient.
    """

    loss: float
    terms: float
    gradient: float


def compare(case: Case, seeds: Iterable[int], *, double: bool = False) -> Difference:
    """Computes a loss both ways, on a batch for each seed; ours in float64 if `double`."""
    import torch

    from benchmarks import trl_executed

    theirs = functools.partial(getattr(trl_executed, case.loss), **case.options)
    dtype = torch.float32 if case.trl_precision == "float32" else torch.float64
    ours = jax.jit(functools.partial(_ours, case))
    errors = []
    for seed in seeds:
        batch = make_batch(seed)
        executed = theirs(batch, dtype)
        with jax.enable_x64(double):
            rounded = jax.tree.map(
                lambda x: jnp.asarray(x, jnp.result_type(float) if x.dtype.kind == "f" else None), batch
            )
            loss, gradient, size = jax.device_get(ours(rounded))
        error = abs(loss - executed.loss)
        apart = np.linalg.norm(gradient.astype(np.float64) - executed.gradient)
        norm = np.linalg.norm(executed.gradient)
        errors.append((error / abs(executed.loss), error / max(size, abs(executed.loss)), apart / norm))
    return Difference(*np.max(errors, axis=0).tolist())


def _ours(case: Case, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes loss, gradient, and the sum of the sizes of the terms: a loss is linear in its weights."""
    weights = None if case.weights is None else case.weights(batch)

    def loss(logits: jax.Array, weights: Any) -> jax.Array:
        return case.ours(logits, batch, weights, **case.options)

    value, (gradient, terms) = jax.value_and_grad(loss, argnums=(0, 1))(batch.policy, weights)
    sizes = jax.tree.map(lambda weight, term: jnp.sum(jnp.abs(weight * term)), weights, terms)
    return value, gradient, sum(jax.tree.leaves(sizes), jnp.zeros(()))


# The table

HEADER = """# Our losses against TRL's, executed

Largest relative errors over {batches} random batches of {rows} rows (responses of 1 to {response} tokens, vocabulary
{vocab}), from logits to loss. TRL computes in float64, where it can ("both": it casts a part to float32). The gradient is
with respect to the logits: the norm of the difference over the norm.

"Of the terms" is relative to the sum of the sizes of the loss's terms: GRPO's have both signs and nearly cancel, so that
the last digit of a term is a large part of the loss. The last two columns are ours in float64: where they are near 1e-15
both compute the same function, and what stands in the columns of float32 is rounding. Two gradients magnify the rounding
of the log-ratios they are functions of: that of `discopop` by 1 / `discopop_tau`, those of the f-divergences exponentially.

Made by `python -m benchmarks.trl_parity`; versions and machine stand in trl_parity.json. BCO is from TRL 1.12.0, as later
releases have none. `fused_head` is the kernel that TRL's trainers score with (log-probabilities, entropy, and what WPO and
metrics need), here an alternating sum of all that it gives.

| loss | options | TRL in | loss | of the terms | gradient | loss, float64 | gradient, float64 |
|---|---|---|---|---|---|---|---|
"""


def table(differences: dict[str, tuple[Difference, Difference]], batches: int) -> str:
    """Writes the errors of all cases as Markdown: ours in float32, and in float64."""
    lines, rows = [], []
    for name, (single, double) in differences.items():
        case, row = CASES[name], (*single, double.loss, double.gradient)
        options = ", ".join(f"`{option}={_words(value)}`" for option, value in case.options.items())
        lines.append(f"| {' | '.join([case.loss, options, case.trl_precision, *(f'{x:.1e}' for x in row)])} |")
        rows.append((name, row))
    for words, exact in (("worst, TRL in float64", True), ("worst, the others", False)):
        chosen = [row for name, row in rows if (CASES[name].trl_precision == "float64") == exact]
        worst = [f"**{max(column):.1e}**" for column in zip(*chosen, strict=True)]
        lines.append(f"| **{words}** | | | {' | '.join(worst)} |")
    shape = {"rows": ROWS, "response": RESPONSE, "vocab": VOCAB}
    return HEADER.format(batches=batches, **shape) + "\n".join(lines) + "\n"


def main() -> None:
    """Compares all, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=20, help="random batches for each loss")
    batches = parser.parse_args().batches
    differences = {
        name: (compare(case, range(batches)), compare(case, range(batches), double=True))
        for name, case in CASES.items()
    }
    written = table(differences, batches)
    (results.FOLDER / "trl_parity.md").write_text(written, "utf-8")
    figures = {
        name: {"float32": single._asdict(), "float64": double._asdict()}
        for name, (single, double) in differences.items()
    }
    results.record("trl_parity", {"batches": batches, "errors": figures}, packages=("trl", "torch", "transformers"))
    print(written)


if __name__ == "__main__":
    main()
