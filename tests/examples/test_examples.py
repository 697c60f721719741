"""The examples, without running them (``make examples`` does): each says what one will see, and is short and plain."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def test_every_documented_example_exists() -> None:
    promised = {
        *("plain_loop", "lightning_cnn", "transformer_feedforward", "read_a_report"),
        *("transformers_finetuning", "ignite_callback", "postmortem_of_a_run"),
    }
    assert promised <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_each_example_says_what_it_shows_and_how_to_run_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert "\nOutput" in docstring
    assert f"python examples/{path.name}" in docstring
    assert "dead" in docstring.partition("\nOutput")[2]  # the output itself, not a promise of one
    assert len(text.splitlines()) - len(docstring.splitlines()) <= 120


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_each_example_is_seeded_and_writes_only_under_runs(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "manual_seed(" in text or "seed_everything(" in text
    if "--out" in ast.get_docstring(ast.parse(text), clean=False):
        assert f'default=Path("runs/{path.stem}")' in text


def code_of(path: Path) -> str:
    """The code of a script or of a notebook's cells."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")


@pytest.mark.parametrize("path", EXAMPLES + NOTEBOOKS, ids=[path.stem for path in EXAMPLES + NOTEBOOKS])
def test_each_example_uses_only_public_names(path: Path) -> None:
    allowed = {"neuronscope", "neuronscope.callbacks", "neuronscope.callbacks.transformers"}
    tree = ast.parse(code_of(path))
    used = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    used |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {name for name in used if name.partition(".")[0] == "neuronscope"}
    assert ours
    assert ours <= allowed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_shows_what_its_cells_gave(path: Path) -> None:
    # `make examples` runs it; `python scripts/notebook.py --write` stores the outputs.
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    printing = [cell for cell in cells if "print(" in "".join(cell["source"])]
    assert printing
    assert all(cell["outputs"] for cell in printing)


def test_a_notebook_is_run_cell_by_cell(tmp_path: Path) -> None:
    cells = ["x = 1\nprint(x)", "x + 1", "x"]
    path = tmp_path / "small.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": [source]} for source in cells]}))
    runner = [sys.executable, str(FOLDER.parent / "scripts" / "notebook.py"), str(path)]
    subprocess.run([*runner, "--write"], check=True, capture_output=True)
    outputs = [cell["outputs"] for cell in json.loads(path.read_text())["cells"]]
    assert [output["text"] for output in outputs[0]] == [["1\n"]]
    assert [[output["data"]["text/plain"] for output in each] for each in outputs[1:]] == [[["2"]], [["1"]]]
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": ["undefined"]}]}))
    failed = subprocess.run(runner, check=False, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "NameError" in failed.stderr
