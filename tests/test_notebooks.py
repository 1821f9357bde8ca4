"""The notebooks: pairs of a script and its executed twin; the scripts run, and what they assert holds.

pytest tests/test_notebooks.py -m "slow or not slow"        # all of them
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "notebooks").glob("*.py"))
QUICK = ("03_optimizers", "05_ppo")
LARGEST = 160_000
ABSOLUTE_PATH = re.compile(r"(?<![\w.\]<])/(?:[\w.+-]+/)+[\w.+-]+")


def test_there_is_a_notebook_for_each_chapter():
    assert [script.stem[:2] for script in SCRIPTS] == [f"{chapter:02}" for chapter in range(1, 13)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_is_its_script_executed(script):
    notebook = script.with_suffix(".ipynb")
    text = notebook.read_text("utf-8")
    cells = json.loads(text)["cells"]
    twin = jupytext.read(script)
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in cells] == [
        (cell.cell_type, cell.source) for cell in twin.cells
    ], "execute it again: jupytext --to ipynb --execute"
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code), "every cell was run"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "it shows a plot"
    assert len(text) < LARGEST
    printed = ["".join(output.get("text", "")) for output in outputs]
    shown = [output.get("data", {}) for output in outputs]
    printed += ["".join(text) for data in shown for kind, text in data.items() if not kind.startswith("image/")]
    assert not [found for words in printed for found in ABSOLUTE_PATH.findall(words)], (
        "where it was executed is not told"
    )
    assert "assert " in "".join(code[-1]["source"]), "it ends in what it claims"


@pytest.mark.parametrize(
    "script",
    [pytest.param(path, marks=() if path.stem in QUICK else pytest.mark.slow) for path in SCRIPTS],
    ids=lambda path: path.stem,
)
def test_a_notebook_runs_and_what_it_claims_holds(script, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
