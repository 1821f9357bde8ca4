"""The command line: `jaxrl-llm <recipe> --options`.

The options of a command are the fields of the recipe's `Config`. Nothing heavy is imported before a recipe is chosen, and
XLA's flags are set before jax is.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Collection, Sequence

from jaxrl_llm import __version__, xla_cpu

COMMANDS = {
    "quickstart": (
        "jaxrl_llm.recipes.quickstart",
        "the main job: SFT, then GRPO on sums, then PPO on CartPole; 5 minutes",
    ),
    "pretrain": ("jaxrl_llm.recipes.text.pretrain", "predict the next token of raw text"),
    "sft": ("jaxrl_llm.recipes.text.sft", "supervised fine-tuning on instructions, chats or text"),
    "reward-model": ("jaxrl_llm.recipes.text.reward_model", "a reward for each text, from pairs or from ratings"),
    "dpo": ("jaxrl_llm.recipes.text.dpo", "Direct Preference Optimization on pairs of responses"),
    "kto": ("jaxrl_llm.recipes.text.kto", "Kahneman-Tversky optimization on responses labelled good or bad"),
    "orpo": ("jaxrl_llm.recipes.text.orpo", "odds-ratio preference optimization, without a reference"),
    "cpo": ("jaxrl_llm.recipes.text.cpo", "contrastive preference optimization, SimPO and AlphaPO"),
    "distill": ("jaxrl_llm.recipes.text.distill", "a small model learns the predictions of a large one"),
    "grpo": ("jaxrl_llm.recipes.text.grpo", "reinforcement learning with rewards, relative to a group of completions"),
    "rloo": ("jaxrl_llm.recipes.text.rloo", "REINFORCE with the other completions of a prompt as the baseline"),
    "reinforce": ("jaxrl_llm.recipes.text.reinforce", "REINFORCE and REINFORCE++ on sampled completions"),
    "ppo": ("jaxrl_llm.recipes.text.ppo", "proximal policy optimization with a critic and the KL in the reward"),
    "trpo": ("jaxrl_llm.recipes.text.trpo", "trust region policy optimization: natural gradient, bounded KL"),
    "generate": ("jaxrl_llm.recipes.text.generate", "complete prompts with a saved model"),
    "evaluate": ("jaxrl_llm.recipes.text.evaluate", "perplexity, right answers and preferences of a saved model"),
    "estimate": (
        "jaxrl_llm.recipes.text.estimate",
        "what a run will need in memory, before anything is allocated",
    ),
    "control ppo": ("jaxrl_llm.recipes.control.ppo", "proximal policy optimization on a gymnax environment"),
    "control trpo": ("jaxrl_llm.recipes.control.trpo", "trust region policy optimization, with a value network"),
    "control a2c": ("jaxrl_llm.recipes.control.a2c", "advantage actor-critic: a step of RMSprop every few steps"),
    "control reinforce": ("jaxrl_llm.recipes.control.reinforce", "REINFORCE on whole episodes, with a baseline"),
    "control grpo": ("jaxrl_llm.recipes.control.grpo", "groups of whole episodes from the same start, no critic"),
    "control tabular": (
        "jaxrl_llm.recipes.control.tabular",
        "a frozen lake: exact values, and Q-learning against them",
    ),
    "control play": ("jaxrl_llm.recipes.control.play", "evaluate an agent of such a run, and draw an episode"),
    "control dqn": ("jaxrl_llm.recipes.control.dqn", "Q-learning with a network, a replay buffer and a target"),
}
"""Each command, the module that has its `Config` and `run`, and what it does."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; the entry point of the `jaxrl-llm` script.

    Args:
        arguments: The words after the program's name; those of the process if not given.
    """
    xla_cpu.set_flag()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        print(f"jaxrl-llm {__version__}")
        return
    if words[:1] == ["sweep"]:
        if words[1:2] in (["tabular"], ["play"]):
            sys.exit(f"jaxrl-llm sweep: {words[1]} trains no agents; name an algorithm, such as ppo.")
        words[0] = "control"
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return
    name = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)
    if name is None:
        sys.exit(_unknown(words))
    _run(name, words[len(name.split()) :])


def _join_processes() -> None:
    """Joins the other processes of a run on many hosts, if `JAX_NUM_PROCESSES` says that there are any.

    `JAX_COORDINATOR_ADDRESS` (host:port of the first) and `JAX_PROCESS_ID` come with it, unless the cluster is one that
    jax knows (Slurm, TPU pods, Open MPI): then `JAX_NUM_PROCESSES=auto` is enough.
    """
    count = os.environ.get("JAX_NUM_PROCESSES", "")
    if count in ("", "1"):
        return
    import jax

    if count == "auto":
        jax.distributed.initialize()
        return
    process = os.environ.get("JAX_PROCESS_ID", "")
    if not (count.isdigit() and process.isdigit() and os.environ.get("JAX_COORDINATOR_ADDRESS")):
        sys.exit(
            f"jaxrl-llm: JAX_NUM_PROCESSES={count} needs a whole number (or auto), JAX_COORDINATOR_ADDRESS=host:port of "
            "the first process and JAX_PROCESS_ID, which counts from 0."
        )
    jax.distributed.initialize(num_processes=int(count), process_id=int(process))


def _run(name: str, options: list[str]) -> None:
    import tyro

    module = importlib.import_module(COMMANDS[name][0])
    presets = getattr(module, "PRESETS", {})
    preset, options = _take_preset(name, options, presets)
    description = module.__doc__ or ""
    if presets:
        description += f"\nOther defaults, which further options change, by --preset NAME: {', '.join(presets)}."
    default = presets.get(preset, tyro.MISSING_NONPROP)
    config = tyro.cli(module.Config, prog=f"jaxrl-llm {name}", description=description, args=options, default=default)
    _join_processes()
    try:
        module.run(config)
    except KeyboardInterrupt:
        print(f"\njaxrl-llm {name}: stopped at once.", file=sys.stderr)
        sys.exit(130)  # what shells give to a program that Ctrl-C ended
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        if os.environ.get("JAXRL_LLM_TRACEBACK"):
            raise
        sys.exit(f"jaxrl-llm {name}: {error}\n(JAXRL_LLM_TRACEBACK=1 shows where.)")


def _take_preset(name: str, options: list[str], presets: Collection[str]) -> tuple[str | None, list[str]]:
    """Finds `--preset NAME` among the options of a command; returns it with the rest."""
    parser = argparse.ArgumentParser(prog=f"jaxrl-llm {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    found, rest = parser.parse_known_args(options)
    if found.preset is not None and found.preset not in presets:
        known = f"one of {', '.join(presets)}" if presets else "left out, for this command has none"
        sys.exit(f"jaxrl-llm {name}: preset must be {known}, got {found.preset!r}.")
    return found.preset, rest


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{meaning}" for name, (_, meaning) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: jaxrl-llm COMMAND [OPTIONS]",
            "",
            *lines,
            f"  {'sweep ALGORITHM':<{width}}control ALGORITHM with --grid name=value,value … and --num-seeds N",
            "",
            "jaxrl-llm COMMAND --help lists the options of a command.",
        ]
    )


def _unknown(words: list[str]) -> str:
    import difflib

    asked = " ".join(words[:2] if words[0] == "control" else words[:1])
    near = difflib.get_close_matches(asked, COMMANDS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"jaxrl-llm: there is no command {asked!r}.{hint}\n\n{_overview()}"


if __name__ == "__main__":
    main()
