"""Runs a benchmark, `python -m benchmarks NAME [options]`, or lists them all, `python -m benchmarks`."""

import ast
import runpy
import sys
from pathlib import Path


def benchmarks() -> dict[str, str]:
    """Finds the benchmarks, modules with a `main`, and the first line of what they say they do."""
    trees = {path.stem: ast.parse(path.read_text("utf-8")) for path in sorted(Path(__file__).parent.glob("*.py"))}
    runs = {
        name: tree
        for name, tree in trees.items()
        if name != "__main__" and any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    }
    return {name: (ast.get_docstring(tree) or name).splitlines()[0] for name, tree in runs.items()}


def main() -> None:
    """Runs what the command line names."""
    known, name = benchmarks(), sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        width = max(map(len, known))
        print("python -m benchmarks NAME [options]    (NAME --help tells the options)\n")
        print("\n".join(f"  {name:<{width}}  {what}" for name, what in known.items()))
        return
    if name not in known:
        raise SystemExit(f"There is no benchmark {name!r}; there are {', '.join(known)}.")
    del sys.argv[1]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
