"""``neuronscope postmortem`` on damaged files, all the way to every output: a finding, or one sentence and a 2."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from neuronscope import cli
from tests.postmortem.files import FORMATS, trained

#: What stands for each kind of file; the readers' own tests damage them all.
KINDS = ("training", "training, older", "safetensors", "Hugging Face Trainer", "distributed")
NAMES = (
    "<script>alert(1)</script>.weight",
    "../../x.weight",
    "a\x1b[2J\r\n.weight",
    "a\u202eb.weight",
    "\ud800.weight",
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, dict[str, bytes]]]:
    """By kind: the path to open, within the folder, and the folder's files."""
    made = {}
    for name in KINDS:
        folder = tmp_path_factory.mktemp("written")
        path = FORMATS[name].write(folder, trained())
        files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
        made[name] = (path.relative_to(folder).as_posix(), files)
    return made


@contextlib.contextmanager
def inside(files: dict[str, bytes]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        for file, content in files.items():
            (Path(name) / file).write_bytes(content)
        yield Path(name)


def ends(path: Path, *more: str) -> str:
    """Run it with every output; what it printed, or the one sentence that it ended with."""
    out, err = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        targets = [f"--{kind}={Path(folder) / kind}" for kind in ("html", "json", "markdown")]
        code = cli.main(["postmortem", str(path), *targets, *more])
        if code == 0:
            json.loads((Path(folder) / "json").read_text(encoding="utf-8"))
            page = (Path(folder) / "html").read_text(encoding="utf-8")
            assert "<script>alert" not in page
            assert all(line.isprintable() for line in out.getvalue().splitlines())
            return out.getvalue()
    assert code == 2
    assert out.getvalue() == ""
    assert len(err.getvalue().splitlines()) == 1
    assert "Traceback" not in err.getvalue()
    return err.getvalue()


@settings(max_examples=60)
@given(st.data())
def test_the_command_ends_with_a_report_or_one_sentence_for_a_file_damaged_anywhere(
    written: dict[str, tuple[str, dict[str, bytes]]], data: st.DataObject
) -> None:
    path, files = written[data.draw(st.sampled_from(KINDS))]
    victim = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[victim])
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with inside(files | {victim: bytes(content)}) as folder:
        ends(folder / path)


@pytest.mark.parametrize("name", NAMES, ids=["HTML", "path", "control characters", "right to left", "half of a pair"])
def test_odd_names_reach_every_output(name: str, tmp_path: Path) -> None:
    weight = torch.ones(3, 2)
    weight[1] = 0
    torch.save({name: weight, "net.2.weight": torch.ones(4, 3)}, tmp_path / "w.pt")
    assert "zero row" in ends(tmp_path / "w.pt")


def test_weights_that_are_not_finite_reach_every_output(tmp_path: Path) -> None:
    """NaN and infinity in weights and in the optimizer's state, in every slot at once."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    for number, parameter in enumerate(model.parameters()):
        with torch.no_grad():
            parameter.reshape(-1)[0] = (float("nan"), float("inf"), -float("inf"), 1e38)[number]
        for slot in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][slot].reshape(-1)[-1] = float("nan")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "w.pt")
    assert "NOT FINITE" in ends(tmp_path / "w.pt")
    assert "NOT FINITE" in ends(tmp_path / "w.pt", "--earlier", str(tmp_path / "w.pt"))


def test_a_checkpoint_of_a_thousand_layers_is_reported(tmp_path: Path) -> None:
    torch.save({f"layers.{at}.weight": torch.zeros(2, 2) for at in range(1000)}, tmp_path / "w.pt")
    assert "… 980 more layers with no more dead than these" in ends(tmp_path / "w.pt")
