"""The command line: what it understands, what it calls, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import neuronscope
from neuronscope import cli
from neuronscope.errors import MissingExtraError, UsageError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The demo's calls, instead of the demo."""
    noted: list[dict[str, Any]] = []

    def run_demo(out: Path, seeds: int, *, quick: bool, processes: int) -> None:
        noted.append({"out": out, "seeds": seeds, "quick": quick, "processes": processes})

    monkeypatch.setattr("neuronscope.demo.program.run_demo", run_demo)
    return noted


@pytest.mark.parametrize(
    ("arguments", "call"),
    [
        ("demo", {"out": Path("runs/demo"), "seeds": 5, "quick": False, "processes": 2}),
        ("demo --out x/y --seeds 3", {"out": Path("x/y"), "seeds": 3, "quick": False, "processes": 2}),
        ("demo --quick --processes 1", {"out": Path("runs/demo"), "seeds": 5, "quick": True, "processes": 1}),
    ],
)
def test_the_demo_command_passes_its_options_on(
    arguments: str, call: dict[str, Any], calls: list[dict[str, Any]]
) -> None:
    assert cli.main(arguments.split()) == 0
    assert calls == [call]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("demo --seeds 0", "at least 1"),
        ("demo --seeds two", "at least 1"),
        ("demo --processes 0", "at least 1"),
        ("demo --sedes 3", "--sedes"),
        ("nonsense", "demo"),
    ],
)
def test_wrong_arguments_end_with_exit_code_2_and_a_reason(
    arguments: str, word: str, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments.split())
    assert end.value.code == 2
    assert word in capsys.readouterr().err
    assert calls == []


def test_without_a_command_the_help_is_shown_and_the_exit_code_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "demo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MissingExtraError("pip install 'neuronscope[demo]'"), 2),
        (UsageError("no folder"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_a_neuronscope_error_is_one_line_without_a_traceback(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("neuronscope.demo.program.run_demo", fail)
    assert cli.main(["demo"]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("neuronscope: ")
    assert str(error) in lines[0]


def test_an_unexpected_exception_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("neuronscope.demo.program.run_demo", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo"])


def test_python_m_neuronscope_runs_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "neuronscope", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"neuronscope {neuronscope.__version__}\n"
