"""Every public function that takes several arguments describes them in its docstring."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "neuronscope").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")])


def public_functions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield each public function of a module, and each public method of its public classes, with its qualified name."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield prefix + node.name, node


def number_of_arguments(function: ast.FunctionDef, *, method: bool) -> int:
    """Return how many arguments a caller passes: all but ``self`` or ``cls``."""
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    variable = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    static = any(isinstance(each, ast.Name) and each.id == "staticmethod" for each in function.decorator_list)
    return len(named) + len(variable) - (method and not static)


def is_framework_hook(path: Path, function: ast.FunctionDef) -> bool:
    """Whether a trainer calls the method, with arguments that the trainer's own documentation describes."""
    return path.is_relative_to(ROOT / "callbacks") and (function.name.startswith("on_") or function.name == "teardown")


def is_rule_of_bounds(path: Path, function: ast.FunctionDef) -> bool:
    """Whether the function stands for one of torch, with arguments that torch's own documentation describes."""
    return path.match("model/bounds/*_ops.py") and [one.arg for one in function.args.args[:1]] == ["dtype"]


def test_every_public_function_with_two_or_more_arguments_describes_them() -> None:
    undescribed = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in SOURCES
        for name, function in public_functions(ast.parse(path.read_text(encoding="utf-8")).body)
        if number_of_arguments(function, method="." in name) >= 2
        and not is_framework_hook(path, function)
        and not is_rule_of_bounds(path, function)
        and "Args:" not in (ast.get_docstring(function) or "")
    ]
    assert undescribed == []
