"""The pages in docs/ name all that is public, and nothing that is not there."""

import ast
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
import tyro

from jaxrl_llm.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jaxrl_llm"
PACKAGES = ("losses", "optimizers", "models", "rollouts", "rewards", "data", "training")
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "cli", "xla_cpu"))
PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
BENCHMARKS = [ROOT / "benchmarks" / "README.md", ROOT / "benchmarks" / "peers" / "README.md"]
REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.md"))
DIRECTIVE = re.compile(r"^::: (\S+)\n((?: {4}.*\n)*)", re.MULTILINE)


def directives():
    """What the reference shows: the path of each object or module, and whether with its members."""
    found = [match for page in REFERENCE for match in DIRECTIVE.findall(page.read_text("utf-8"))]
    return {path: "members: false" not in options for path, options in found}


def exported(package):
    """For each name that a package takes from its modules as its own, or assigns: the entries that would show it."""
    folder = PACKAGE / package
    for node in ast.parse((folder / "__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            for name in (alias.name for alias in node.names if alias.asname == alias.name):
                # Where a module has the name of what is in it, the entry package.name would show the module.
                hidden = (folder / f"{name}.py").exists() and node.module != f"jaxrl_llm.{package}"
                yield {f"{node.module}.{name}"} | (set() if hidden else {f"jaxrl_llm.{package}.{name}"})
        if isinstance(node, ast.Assign):
            yield from ({f"jaxrl_llm.{package}.{target.id}"} for target in node.targets)


def find(path):
    """The object that a dotted path names, or the module."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        with contextlib.suppress(ModuleNotFoundError):
            value = importlib.import_module(".".join(parts[:length]))
            return functools.reduce(getattr, parts[length:], value)
    raise AssertionError(f"there is no {path}.")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference(package):
    shown = {path for path, members in directives().items() if members}
    names = list(exported(package))
    assert names
    assert [entries for entries in names if not entries & shown] == []


def test_every_module_that_is_no_package_and_every_command_is_in_the_reference():
    shown = directives()
    modules = [f"jaxrl_llm.{name}" for name in MODULES] + [module for module, _ in COMMANDS.values()]
    assert [module for module in modules if not shown.get(module)] == []


def test_every_entry_of_the_reference_exists():
    for path in directives():
        assert find(path) is not None


def test_every_page_of_the_reference_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = [path.relative_to(ROOT).as_posix() for path in [*REFERENCE, *PAGES]]
    assert [page for page in pages if f" {page}\n" not in navigation] == []


def test_every_function_of_the_algorithms_exists():
    rows = [line.split("|") for line in (ROOT / "docs" / "algorithms.md").read_text("utf-8").splitlines()]
    named = [name for cells in rows if len(cells) == 7 for name in re.findall(r"`([\w.]+)`", cells[3])]
    assert len(named) > 50
    for name in named:
        module, _, function = name.rpartition(".")
        assert callable(getattr(find(f"jaxrl_llm.{module}"), function)), name


def parsed(command, words):
    """The config of a command line; what it must have and the page leaves out is made up."""
    module = importlib.import_module(COMMANDS[command][0])
    default = tyro.MISSING_NONPROP
    if "--preset" in words:
        place = words.index("--preset")
        default = module.PRESETS[words[place + 1]]
        words = words[:place] + words[place + 2 :]
    fields = [field for field in dataclasses.fields(module.Config) if field.default is dataclasses.MISSING]
    needed = [f"--{field.name.replace('_', '-')}" for field in fields]
    words = words + [word for option in needed if option not in words for word in (option, "any")]
    return module, tyro.cli(module.Config, args=words, default=default)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one_that_would_run(page):
    """Commands begin a line of a block, or stand between backticks; options stand behind them."""
    for line in re.findall(r"(?:^|`)jaxrl-llm ([a-z][^`#\n]+)", page.read_text("utf-8"), re.MULTILINE):
        words = shlex.split(line)
        words = ["control", *words[1:]] if words[0] == "sweep" else words
        command = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)
        assert command, f"there is no command {line!r}"
        try:
            module, config = parsed(command, words[len(command.split()) :])
        except (SystemExit, KeyError) as error:
            raise AssertionError(f"jaxrl-llm {line}") from error
        if hasattr(module, "validate"):
            module.validate(config)


@pytest.mark.parametrize("page", PAGES + BENCHMARKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_benchmark_and_test_that_is_named_exists(page):
    text = page.read_text("utf-8")
    for name in re.findall(r"python -m benchmarks[. ]([a-z]\w+)", text):
        assert importlib.util.find_spec(f"benchmarks.{name}"), name
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert f"def {name}" in (ROOT / path).read_text("utf-8"), (path, name)


@pytest.mark.parametrize("page", PAGES + BENCHMARKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_result_stands_beside_the_command_that_made_it(page):
    for link, command in re.findall(r"\(([\w./]+\.json)\):\s`([^`]+)`", page.read_text("utf-8")):
        assert json.loads((page.parent / link).read_text("utf-8"))["command"] == command


def numbers_in(value):
    """All numbers of a result file, wherever they stand in it."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [number for part in parts for number in numbers_in(part)]
    return [value] if isinstance(value, int | float) else []


def test_every_figure_of_the_choice_is_that_of_a_result_beside_it():
    """Decimals of a section are figures of its files, rounded; megabytes may be written as GB, parameters as millions."""
    page = ROOT / "docs" / "choosing.md"
    figures = 0
    for section in page.read_text("utf-8").split("\n## ")[1:]:
        files = [page.parent / link for link in re.findall(r"\(([\w./]+\.json)\)", section)]
        results = [numbers_in(json.loads(file.read_text("utf-8"))["figures"]) for file in files]
        known = [number * scale for numbers in results for number in numbers for scale in (1, 1e-3, 1e-6)]
        text = re.sub(r"\(\S+\)|`[^`]*`|GPT-2 of \S+|β \S+", "", section)
        for figure in re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", text):
            step = 10.0 ** -len(figure.split(".")[1])
            assert any(abs(number - float(figure)) <= 0.5001 * step for number in known), (section[:30], figure)
            figures += 1
    assert figures > 80
