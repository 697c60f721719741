"""The examples, without running them (``make examples`` does): each says what one will see, and is short and plain."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))


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
    assert len(text.splitlines()) - len(docstring.splitlines()) <= 100


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_each_example_is_seeded_and_writes_only_under_runs(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "manual_seed(" in text or "seed_everything(" in text
    if "--out" in ast.get_docstring(ast.parse(text), clean=False):
        assert f'default=Path("runs/{path.stem}")' in text


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_each_example_uses_only_public_names(path: Path) -> None:
    allowed = {"neuronscope", "neuronscope.callbacks", "neuronscope.callbacks.transformers"}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    used |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {name for name in used if name.partition(".")[0] == "neuronscope"}
    assert ours
    assert ours <= allowed
