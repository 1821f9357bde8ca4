"""What the site needs beside mkdocs: the repository's own files as pages, formulas as MathML, shapes as they are written.

`mkdocs build --strict` runs the functions by their names; `Docstrings` is an extension of griffe, which reads the code.
"""

import ast
import re
from html import unescape
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
BESIDE = ("*.md", "benchmarks/**/*", "notebooks/**/*")
ENDINGS = (".md", ".json", ".png", ".py", ".ipynb")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Lays the site out as the repository is: `docs/` where it is, and `BESIDE` it what pages show or link to."""
    placed = [_placed(file, config) for file in files]
    found = [path for pattern in BESIDE for path in sorted(ROOT.glob(pattern)) if path.suffix in ENDINGS]
    return Files(placed + [_file(path, config) for path in found])


def on_page_content(html: str, **_: Any) -> str:
    """Replaces formulas in LaTeX by MathML, which browsers draw without a script."""
    return FORMULA.sub(_formula, html)


class Docstrings(griffe.Extension):
    """Keeps strings in annotations as they stand, for those of jaxtyping are shapes; knows `Example:` as a section."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Calls a single example what griffe calls any number of them."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)

    def on_function_instance(self, *, node: Any, func: griffe.Function, **_: Any) -> None:
        """Reads the annotations of parameters and of what is returned anew."""
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or func.parent is None:
            return
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs + [node.args.vararg, node.args.kwarg]
        for argument in arguments:
            if argument is not None and argument.annotation is not None:
                func.parameters[argument.arg].annotation = griffe.get_expression(
                    argument.annotation, func.parent, parse_strings=False
                )
        if node.returns is not None:
            func.returns = griffe.get_expression(node.returns, func.parent, parse_strings=False)

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, **_: Any) -> None:
        """Reads the annotation of a field anew."""
        if isinstance(node, ast.AnnAssign) and attr.parent is not None:
            attr.annotation = griffe.get_expression(node.annotation, attr.parent, parse_strings=False)


def _placed(file: File, config: MkDocsConfig) -> File:
    """The file at its place in the repository; those of the theme stay where they are."""
    path = Path(file.abs_src_path or "/")
    return _file(path, config) if path.is_relative_to(config.docs_dir) else file


def _file(path: Path, config: MkDocsConfig) -> File:
    place, urls = path.relative_to(ROOT).as_posix(), config.use_directory_urls
    return File(place, src_dir=str(ROOT), dest_dir=config.site_dir, use_directory_urls=urls)


def _formula(found: re.Match[str]) -> str:
    latex = re.sub(r"\\mathrm\{([A-Za-z]{2,})\}", r"\\text{\1}", unescape(found[3]))
    return convert(latex.strip(), display="block" if found[2] == "[" else "inline")
