"""Public names: what `import neuronscope` gives is what was agreed, and every module says what it exports."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

import neuronscope as ns

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "neuronscope").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("neuronscope", *parts) if parts[0] == "callbacks" else parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = sorted({module_name(path): path for path in SOURCES}.items())


def test_the_public_names_are_those_of_the_contract() -> None:
    # A name taken out or renamed here breaks users: say so in CHANGELOG.md, and why in docs/design.md.
    assert set(ns.__all__) >= {
        "Activation",
        "Census",
        "NeuronscopeError",
        "NeuronscopeWarning",
        "Policy",
        "PostmortemReport",
        "Report",
        "Scope",
        "Tally",
        "Verdict",
        "__version__",
        "postmortem",
        "scan",
        "watch",
    }


@pytest.mark.parametrize("name", ns.__all__)
def test_each_public_name_can_be_imported(name: str) -> None:
    assert getattr(ns, name) is not None
    assert name in dir(ns)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'wach'"):
        _ = ns.wach  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_each_module_has_a_docstring_and_a_list_of_exports(name: str, path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{name} has no docstring"
    defined = {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    }
    if name == "neuronscope.count.triton_kernels" and importlib.util.find_spec("triton") is None:
        pytest.skip("no triton")
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", None)
    if exported is None:
        assert defined == set(), f"{name} has no __all__, yet defines {sorted(defined)}"
        return
    assert len(exported) == len(set(exported))
    for public in exported:
        getattr(module, public)


def test_no_two_modules_have_the_same_name() -> None:
    names = [path.stem for _, path in MODULES if not path.stem.startswith("__")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_no_module_has_a_name_without_meaning() -> None:
    assert {"utils", "helpers", "common", "base", "misc"} & {path.stem for _, path in MODULES} == set()


def test_no_two_classes_have_the_same_name() -> None:
    homes: dict[str, list[str]] = {}
    for name, path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name.lstrip("_"), []).append(name)
    del homes["DeadNeuronCallback"]  # of each framework that calls its callbacks so, in a module of its name
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}
