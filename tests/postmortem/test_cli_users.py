"""``neuronscope postmortem`` with a user's functions that fail, exit or return nothing of use; and ``--example``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import neuronscope as ns
from neuronscope import cli
from neuronscope.errors import UsageError

THEIRS = """
import sys

import torch
from torch import nn

def network():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

def batches():
    return [torch.rand(200, 4), torch.rand(200, 4)]

def none(*_): return None
def number(*_): return 7
def text(*_): return "batches"
def exit_0(*_): sys.exit(0)
def exit_3(*_): sys.exit(3)
def exit_text(*_): sys.exit("no data here")
def exit_bare(*_): raise SystemExit
class Stop(BaseException): ...
def stop(*_): raise Stop("enough")
def interrupt(*_): raise KeyboardInterrupt

def no_batch(): return iter(())
def nones(): return [None, None]
def texts(): return ["a", "b"]
def numbers(): return range(3)
def empty_tuples(): return [(), ()]
def no_inputs(): return [(None, torch.zeros(5))]
def mapping_of_nothing(): return [{"x": None}]
def scalar(*_): return torch.tensor(3.0)
def no_examples(): return [torch.zeros(0, 4)]
def none_later():
    yield torch.rand(200, 4)
    yield None
def exit_later():
    yield torch.rand(200, 4)
    sys.exit(0)
class Lengthy:
    def __iter__(self): sys.exit(0)
def exit_when_iterated(): return Lengthy()

def row_losses(output, batch): return output.sum(dim=1)
def detached_loss(output, batch): return output.detach().sum()

class ExitsInForward(nn.Sequential):
    def __init__(self): super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    def forward(self, images): sys.exit(0)

class ExitsInTrain(ExitsInForward):
    def train(self, mode=True): sys.exit(0)

def example(): return torch.zeros(1, 4)
def example_arguments(): return (torch.zeros(1, 4),)
def example_named(): return {"input": torch.zeros(1, 4)}
held = torch.zeros(2, 4)
"""
MODULES = {
    "theirs": THEIRS,
    "exits": "import sys\nsys.exit(0)\n",
    "fails": "raise ValueError('no such disk')\n",
    "unfinished": "def batches(:\n",
    "lazy": "def __getattr__(name):\n    raise SystemExit(0)\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a checkpoint and a user's modules."""
    monkeypatch.chdir(tmp_path)
    for name, content in MODULES.items():
        (tmp_path / f"{name}.py").write_text(content)
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    nn.init.constant_(network[0].bias, -1000.0)
    torch.save(network.state_dict(), tmp_path / "net.pt")
    return tmp_path


def refused(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence that the command ends with; a network that is wholly dead must not pass in any of these."""
    code = cli.main(["postmortem", "net.pt", *line.split(), "--fail-above", "5"])
    said = capsys.readouterr()
    assert (code, said.out, len(said.err.splitlines())) == (2, "", 1), said
    assert said.err.startswith("neuronscope: ")
    return said.err


MODEL, DATA, LOSS, EXAMPLE = (
    "--model theirs:",
    "--model theirs:network --data theirs:",
    "--model theirs:network --data theirs:batches --loss theirs:",
    "--model theirs:network --example theirs:",
)


@pytest.mark.parametrize("what", [MODEL, DATA, LOSS, EXAMPLE], ids=["model", "data", "loss", "example"])
@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("none", "None"),
        ("number", "int"),
        ("text", "str"),
        ("exit_0", "called sys.exit(0)"),
        ("exit_3", "called sys.exit(3)"),
        ("exit_text", "called sys.exit('no data here')"),
        ("exit_bare", "called sys.exit()"),
        ("stop", "gave Stop: enough"),
    ],
)
def test_a_users_function_that_exits_or_returns_a_wrong_value_is_one_sentence(
    folder: Path, what: str, function: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(what + function, capsys)
    assert function in said
    assert words in said


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("no_batch", "at least one batch"),
        ("nones", "got None"),
        ("texts", "got str"),
        ("numbers", "got int"),
        ("empty_tuples", "an empty tuple"),
        ("no_inputs", "tuple that begins with None"),
        ("mapping_of_nothing", "got dict"),
        ("scalar", "a tensor of shape ()"),
        ("no_examples", "a tensor of shape (0, 4)"),
        ("none_later", "got None"),
        ("exit_later", "called sys.exit(0)"),
        ("exit_when_iterated", "called sys.exit(0)"),
    ],
)
def test_data_that_is_not_batches_is_refused_in_one_sentence(
    folder: Path, function: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(DATA + function, capsys)
    assert "`data`" in said
    assert words in said


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("row_losses", "a tensor of shape (200,)"),
        ("detached_loss", "no gradient flows back from"),
    ],
)
def test_a_loss_that_cannot_be_differentiated_is_refused_in_one_sentence(
    folder: Path, function: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(LOSS + function, capsys)


@pytest.mark.parametrize("network", ["ExitsInForward", "ExitsInTrain"])
@pytest.mark.parametrize("more", ["", " --data theirs:batches"])
def test_a_network_that_exits_is_reported_in_one_sentence(
    folder: Path, network: str, more: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "model" in (said := refused(MODEL + network + more, capsys))
    assert "called sys.exit(0)" in said


@pytest.mark.parametrize("argument", ["model", "data", "loss", "example"])
@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("exits", "called sys.exit(0)"),
        ("fails", "gave ValueError: no such disk"),
        ("unfinished", "gave SyntaxError"),
        ("lazy", "called sys.exit(0)"),
    ],
)
def test_a_users_module_that_exits_or_fails_on_import_is_reported(
    folder: Path, argument: str, module: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {"model": "", "loss": f"{DATA}batches ", "data": f"{MODEL}network ", "example": f"{MODEL}network "}
    said = refused(f"{before[argument]}--{argument} {module}:f", capsys)
    assert f"`{argument}`" in said
    assert f"'{module}'" in said
    assert words in said


@pytest.mark.parametrize("what", [MODEL, DATA, LOSS, EXAMPLE], ids=["model", "data", "loss", "example"])
def test_an_interrupt_in_the_users_code_stays_an_interrupt(
    folder: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["postmortem", "net.pt", *f"{what}interrupt".split()]) == 130
    assert capsys.readouterr().err == "neuronscope: interrupted\n"


def test_in_python_a_function_that_exits_raises_a_clear_error(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"called sys\.exit\(0\)"):
        ns.postmortem("net.pt", lambda: sys.exit(0))


# --- example ---------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Needs two inputs, one of them integers: none of it can be guessed."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 6)
        self.fc = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.out = nn.Linear(6, 5)
        self.act = nn.ReLU()

    def forward(self, images: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return self.act(self.out(self.norm(self.fc(images) + self.words(words))))


TWO = """
import torch
from test_cli_users_two import Two

def named(): return {"words": torch.zeros(1, dtype=torch.int64), "images": torch.zeros(1, 4)}
def arguments(): return torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64)
"""


@pytest.fixture
def two(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of a network with two inputs, whose third neuron is proved dead once the network is run."""
    network = Two()
    with torch.no_grad():
        network.out.bias[2] = -1000.0
    torch.save(network.state_dict(), "two.pt")
    (folder / "two.py").write_text(TWO)
    module: Any = type(sys)("test_cli_users_two")
    module.Two = Two
    monkeypatch.setitem(sys.modules, "test_cli_users_two", module)
    return folder


@pytest.mark.parametrize("example", ["1x4,1:int64", "3x4:float32,3:int64", "two:named", "two:arguments"])
def test_an_example_from_the_command_line_makes_proofs_possible(
    two: Path, example: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["postmortem", "two.pt", "--model", "two:Two", "--fail-above", "0"]
    assert cli.main(line) == 0
    assert "could not be run once" in capsys.readouterr().out
    assert cli.main([*line, "--example", example]) == 1
    assert "1 proved" in capsys.readouterr().out


def test_the_python_function_takes_the_same_examples(two: Path) -> None:
    values = (torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64))
    for example in ("1x4,1:int64", "two:named", values, {"images": values[0], "words": values[1]}, lambda: values):
        assert ns.postmortem("two.pt", Two, example=example)["out"].dead_by_basis()["proved"] == 1


def test_an_example_by_shape_has_the_dtype_of_the_model(folder: Path) -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    torch.save(network.state_dict(), "double.pt")
    assert ns.postmortem("double.pt", network, example="2x4").level == "model"


@pytest.mark.parametrize(
    "example",
    ["x", "theirs", "1xx4", "1x4,", "0x4", "1x-4", "4x", "1x4:float33", "1x4:load", "9x99999999999999999999", "1x5"],
)
def test_a_wrong_example_is_refused_and_the_error_shows_how_to_write_one(
    folder: Path, example: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(f"--model theirs:network --example {example}", capsys)
    assert "1x3x224x224" in said
    assert "`package.module:name`" in said


@pytest.mark.parametrize("function", ["example", "example_arguments", "example_named", "held"])
def test_examples_may_be_passed_by_argument_name(
    folder: Path, function: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["postmortem", "net.pt", *f"{EXAMPLE}{function}".split(), "--box", "0", "1"]) == 0
    assert "8 proved" in capsys.readouterr().out


def test_an_example_needs_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Expected argument `model` with `example`" in refused("--example 1x4", capsys)


def test_the_help_shows_both_spellings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["postmortem", "--help"])
    said = capsys.readouterr().out
    assert "1x3x224x224" in said
    assert "PKG.MOD:FN" in said
