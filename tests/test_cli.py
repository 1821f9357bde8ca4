import dataclasses
import importlib
import os
import re
import resource
import subprocess
import sys

import pytest

import jaxrl_llm
from jaxrl_llm import cli, xla_cpu
from jaxrl_llm.cli import COMMANDS
from jaxrl_llm.recipes.control import trpo
from jaxrl_llm.recipes.text import sft
from tests.recipes.runs import TINY, words, write_rows


def refused(*arguments):
    """What a command says before it exits with an error."""
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code not in (None, 0)
    return str(stop.value)


def python(*arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=300)


def options_of_help(command, monkeypatch, capsys):
    """Each option with what the help says about it, in a terminal so wide that it breaks no line."""
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("NO_COLOR", "1")
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    text = "\n".join(line for line in lines if not re.fullmatch(r"[-╭╮╰╯─ ]+|.*─.*", line))
    parts = re.split(r"\n(?=--?[a-z])", text)[1:]
    found = re.compile(
        r"(?:-h, )?--([a-z0-9-]+)(?:, --no-\S+)?(?: (?:\S*\|\S*|[A-Z]+|\{\S*\}|\[.*?\]\]?))*\s+(.*)", re.DOTALL
    )
    return {name: text.strip() for name, text in (found.fullmatch(part).groups() for part in parts)}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_option_with_its_meaning_and_default(command, monkeypatch, capsys):
    config = importlib.import_module(COMMANDS[command][0]).Config
    shown = options_of_help(command, monkeypatch, capsys)
    fields = {field.name.replace("_", "-"): field for field in dataclasses.fields(config)}
    assert shown.keys() - {"help"} == fields.keys()
    for name, text in shown.items():
        if name != "help":
            meaning, default = re.fullmatch(r"(.*?)\s*\((default: .*|required)\)", " ".join(text.split())).groups()
            assert len(meaning) > 8, name
            assert (default == "required") == (fields[name].default is dataclasses.MISSING), name


def test_defaults_in_the_help_are_those_of_the_settings(monkeypatch, capsys):
    shown = options_of_help("sft", monkeypatch, capsys)
    for field in dataclasses.fields(sft.Config):
        default = "''" if field.default == "" else str(field.default)
        if isinstance(field.default, tuple):
            default = " ".join(map(str, field.default))  # as it is written on a command line
        assert shown[field.name.replace("_", "-")].split("(default: ")[-1] == f"{default})", field.name


@pytest.mark.parametrize("command", COMMANDS)
def test_no_sentence_of_the_help_is_broken_where_its_docstring_is(command, monkeypatch, capsys):
    shown = options_of_help(command, monkeypatch, capsys)
    assert shown
    for name, text in shown.items():
        assert all(line.endswith(".") for line in text.splitlines()[:-1]), name


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_the_overview_lists_every_command_with_its_meaning(arguments, capsys):
    cli.main(arguments)
    printed = capsys.readouterr().out
    for name, (_, meaning) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(meaning)}$", printed, re.MULTILINE)


def test_the_version_is_that_of_the_package(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"jaxrl-llm {jaxrl_llm.__version__}\n"


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        ("sftt", "sft"),
        ("grpoo", "grpo"),
        ("quick", "quickstart"),
        ("control", "control ppo"),
        ("control pp", "control ppo"),
    ],
)
def test_an_unknown_command_is_answered_with_the_nearest(asked, nearest):
    message = refused(*asked.split())
    assert f"there is no command {asked!r}. Did you mean {nearest!r}?" in message
    assert "usage: jaxrl-llm COMMAND" in message


def test_what_trains_no_agents_has_no_sweep():
    assert refused("sweep", "play") == "jaxrl-llm sweep: play trains no agents; name an algorithm, such as ppo."


def test_an_unknown_command_like_no_other_is_answered_with_all():
    message = refused("xyzzy")
    assert "there is no command 'xyzzy'.\n" in message
    assert "generate" in message


def test_a_wrong_value_is_refused_with_option_value_and_meaning():
    message = refused("sft", "--learning-rate", "-1")
    assert message.startswith("jaxrl-llm sft: learning_rate must be positive, got -1.0.")


@pytest.mark.parametrize("words", [["--preset", "guide"], ["--preset=guide"]])
def test_a_preset_sets_other_defaults_that_options_change(words, monkeypatch):
    found = []
    monkeypatch.setattr("jaxrl_llm.recipes.control.trpo.run", found.append)
    cli.main(["control", "trpo", *words, "--max-kl", "0.02"])
    assert found == [dataclasses.replace(trpo.PRESETS["guide"], max_kl=0.02)]
    trpo.validate(found[0])


@pytest.mark.parametrize("command", [name for name in COMMANDS if name.startswith("control")])
def test_every_preset_is_a_run_that_can_be_made(command):
    module = importlib.import_module(COMMANDS[command][0])
    for config in getattr(module, "PRESETS", {}).values():
        module.validate(config)


def test_a_preset_that_is_not_there_is_refused():
    assert "preset must be one of cleanrl, guide, guide-shared, got 'gide'" in refused(
        "control", "ppo", "--preset", "gide"
    )
    assert "preset must be left out, for this command has none" in refused("generate", "--preset", "guide")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sft", "--learning-rate", "fast"], ["--learning-rate", "'fast'", "Peak learning rate"]),
        (["sft", "--dtype", "float16"], ["--dtype", "'float16'", "'bfloat16'"]),
        (["sft", "--lerning-rate", "1"], ["--lerning-rate", "Perhaps you meant", "--learning-rate"]),
        (["dpo"], ["--dataset", "`chosen`", "(required)"]),
    ],
)
def test_options_that_cannot_be_read_are_refused_with_help(arguments, said, capsys):
    refused(*arguments)
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    for words_of_it in said:
        assert words_of_it in message


def test_a_bad_row_ends_the_command_with_its_line_and_field_and_no_traceback(tmp_path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b"}, {"instruction": "c", "output": 5}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    ended = python("-m", "jaxrl_llm.cli", "sft", *words(**TINY, dataset=path, output_dir=tmp_path / "run"))
    assert ended.returncode == 1
    assert f"jaxrl-llm sft: {path}, line 3: field `output` is int '5'; expected a string." in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()


def test_an_environment_variable_shows_where_an_error_comes_from(monkeypatch):
    monkeypatch.setenv("JAXRL_LLM_TRACEBACK", "1")
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        cli.main(["sft", "--learning-rate", "-1"])


def test_an_error_that_is_ours_is_not_hidden(monkeypatch):
    monkeypatch.setattr(sft, "run", lambda config: {}["missing"])
    with pytest.raises(KeyError):
        cli.main(["sft"])


def test_a_second_ctrl_c_ends_the_command_without_a_traceback(monkeypatch, capsys):
    def run(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(sft, "run", run)
    with pytest.raises(SystemExit) as stop:
        cli.main(["sft"])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "\njaxrl-llm sft: stopped at once.\n"


def test_the_overview_is_fast_for_it_imports_nothing_heavy():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = "import sys; from jaxrl_llm.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    ended = python("-c", code)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    loaded = {name.partition(".")[0] for name in ended.stderr.split()}
    assert "usage: jaxrl-llm" in ended.stdout
    assert not loaded & {"jax", "numpy", "transformers", "datasets", "flax", "tyro", "rich"}
    assert after.ru_utime - before.ru_utime < 1  # seconds of computing, whatever else the machine does


def test_the_flag_against_the_miscompile_is_set_before_jax_is_imported():
    code = (
        "import importlib.abc, os, sys\n"
        "class Finder(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'jax': print('FLAGS', os.environ.get('XLA_FLAGS'))\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from jaxrl_llm.cli import main\n"
        "main(['generate', '--help'])\n"
    )
    ended = python("-c", code, XLA_FLAGS="--xla_cpu_enable_fast_math=false")
    assert ended.stdout.splitlines()[0] == f"FLAGS --xla_cpu_enable_fast_math=false {xla_cpu.FLAG}"
