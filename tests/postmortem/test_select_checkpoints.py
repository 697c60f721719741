"""Several checkpoints: which files and folders are one, in which order, and what is left out, with its reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import neuronscope as ns
from neuronscope import cli
from neuronscope.checkpoints.select_checkpoints import find_checkpoints, select_checkpoints
from neuronscope.errors import CheckpointError, UsageError
from tests.postmortem import files


def weights(seed: int = 0, widths: tuple[int, ...] = (6, 5, 2), prefix: str = "") -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(*[layer for pair in zip(widths, widths[1:]) for layer in (nn.Linear(*pair), nn.ReLU())])
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


def save(path: Path, step: int | None, state: dict[str, torch.Tensor] | None = None, **more: Any) -> Path:
    content = {"model": weights(step or 0) if state is None else state, **more}
    torch.save(content if step is None else {**content, "step": step}, path)
    return path


def steps(*paths: Path) -> list[int]:
    return [one.step for one in select_checkpoints(find_checkpoints(paths)[0]).chosen]


def reasons(report: ns.PostmortemReport) -> dict[str, str]:
    assert report.timeline is not None
    return {Path(one.path).name: one.reason for one in report.timeline.left_out}


def test_checkpoints_are_in_the_order_of_their_steps_and_not_of_names(tmp_path: Path) -> None:
    paths = [save(tmp_path / name, step) for name, step in (("c.pt", 30), ("a.ckpt", 200), ("b.pth", 9))]
    assert steps(*paths) == steps(tmp_path) == [9, 30, 200]
    report = ns.postmortem(paths)
    assert report.path.endswith("a.ckpt")
    assert report.global_step == 200


def test_a_folder_of_checkpoints_holds_files_of_weights_and_no_others(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", 1)
    save(tmp_path / "b.ckpt", 2)
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.pt")
    torch.save([1, 2], tmp_path / "rng_state.pth")
    torch.save([1, 2], tmp_path / "training_args.bin")
    (tmp_path / "log.txt").write_text("loss 3")
    (tmp_path / "deeper").mkdir()
    save(tmp_path / "deeper" / "c.pt", 3)
    assert steps(tmp_path) == [1, 2]


def test_an_optimizers_file_with_a_name_of_its_own_is_no_checkpoint(tmp_path: Path) -> None:
    """As torchtune saves: weights that do not say their step, and the optimizer's state, whose name says nothing."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save(tmp_path / "hf_model_0001_0.pt", None, model.state_dict())
    torch.save({"optimizer": optimizer.state_dict(), "epochs_run": 1}, tmp_path / "recipe_state.pt")
    with pytest.raises(UsageError, match=r"recipe_state.pt: it holds no weights of a network, but .* as `optimizer`"):
        ns.postmortem(tmp_path)


@pytest.mark.parametrize("name", ["Hugging Face Trainer", "sharded folder", "distributed"])
def test_a_folder_that_is_a_checkpoint_is_one(name: str, tmp_path: Path) -> None:
    files.FORMATS[name].write(tmp_path, files.trained())
    assert find_checkpoints([tmp_path]) == ([tmp_path], [])
    assert ns.postmortem(tmp_path).timeline is None


@pytest.mark.parametrize("write", [files.trainer_folder, files.distributed])
def test_the_folders_in_a_folder_are_checkpoints(write, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, files.trained())
    assert find_checkpoints([tmp_path])[0] == [tmp_path / "first", tmp_path / "second"]


def test_the_output_folder_of_a_trainer_is_its_checkpoints(tmp_path: Path) -> None:
    for step in (20, 100):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        files.trainer_folder(folder, files.trained(step))
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    assert steps(tmp_path) == [20, 100]
    files.trainer_folder(tmp_path, files.trained(100))  # the final weights beside them
    report = ns.postmortem(tmp_path)
    assert [point.step for point in report.timeline.checkpoints] == [20, 100]
    assert "do not say at which step" in reasons(report)[tmp_path.name]


def test_a_folder_with_one_checkpoint_is_that_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", 5)
    report = ns.postmortem(tmp_path, step=7)
    assert (report.path, report.timeline, report.global_step) == (str(tmp_path / "a.pt"), None, 7)
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-3"):
        files.trainer_folder(folder, files.trained())
    report = ns.postmortem(tmp_path / "out")
    assert (report.global_step, report.timeline) == (files.STEPS, None)
    assert any("the final weights" in note for note in report.notes)


def test_a_folder_without_checkpoints_is_reported_as_before(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="without a checkpoint in it"):
        ns.postmortem(tmp_path)
    for path in ([], 5, [5]):
        with pytest.raises(UsageError, match="at least one checkpoint"):
            ns.postmortem(path)
    with pytest.raises(CheckpointError, match="No such file"):
        ns.postmortem(tmp_path / "missing.pt")


def test_the_same_path_twice_is_one_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt", 5)
    assert ns.postmortem([path, path]).timeline is None
    assert ns.postmortem([tmp_path, path]).timeline is None


def test_of_checkpoints_with_the_same_step_the_first_stays(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", 10)
    save(tmp_path / "b.pt", 20)
    shutil.copy(tmp_path / "b.pt", tmp_path / "last.pt")
    save(tmp_path / "other.pt", 20, weights(99))
    report = ns.postmortem(tmp_path)
    assert [point.step for point in report.timeline.checkpoints] == [10, 20]
    assert reasons(report) == {
        "last.pt": "it has the same step and the same weights as b.pt",
        "other.pt": "it has the same step as b.pt, but other weights: it may be of another run",
    }
    assert any("other.pt" in note for note in report.notes)


def test_a_checkpoint_without_a_step_is_left_out(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", 10)
    save(tmp_path / "b.pt", None)
    report = ns.postmortem(tmp_path)
    assert reasons(report) == {"b.pt": "it does not say at which step it was saved"}
    assert "Only the checkpoint of step 10" in str(report)
    (tmp_path / "a.pt").unlink()
    save(tmp_path / "c.pt", None)
    with pytest.raises(UsageError, match=r"order of their steps.*b\.pt: it does not say"):
        ns.postmortem(tmp_path)


def test_another_network_is_left_out_and_a_changed_one_is_not(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", 1, weights(widths=(6, 7, 7, 3)))
    save(tmp_path / "b.pt", 2, weights(widths=(6, 5, 4)))  # one of two layers is another
    save(tmp_path / "c.pt", 3)
    report = ns.postmortem(tmp_path)
    assert [point.step for point in report.timeline.checkpoints] == [2, 3]
    assert reasons(report)["a.pt"].startswith("it is of another network than the last one: 2 of 2 layers")
    assert any("b.pt (step 2): 1 of 2 layers are not in it, 2 first." in note for note in report.notes)
    assert [layer.dead.tolist() for layer in report.timeline.layers] == [[0, 0], [-1, 0]]


def test_renamed_layers_are_the_same_layers(tmp_path: Path) -> None:
    old = {name.replace("0.", "first.").replace("2.", "second."): value for name, value in weights().items()}
    old["first.weight"][3] = 0
    save(tmp_path / "a.pt", 1, old)
    save(tmp_path / "b.pt", 2)
    report = ns.postmortem(tmp_path)
    assert any("other names (first for 0)" in note for note in report.notes)
    assert [(layer.name, layer.dead.tolist()) for layer in report.timeline.layers] == [("0", [0, 0]), ("2", [0, 0])]


def test_an_unreadable_file_is_left_out_and_the_command_ends_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        save(tmp_path / f"{step}.pt", step)
    whole = (tmp_path / "2.pt").read_bytes()
    (tmp_path / "3.pt").write_bytes(whole[: len(whole) // 2])
    assert cli.main(["postmortem", str(tmp_path), "--fail-above", "0", "--json", str(tmp_path / "a.json")]) == 2
    said = capsys.readouterr()
    assert "3.pt" in said.err
    assert "Over 2 checkpoints, steps 1 to 2" in said.out  # the report is written all the same
    left_out = json.loads((tmp_path / "a.json").read_text())["timeline"]["left_out"]
    assert [(Path(one["path"]).name, one["unreadable"]) for one in left_out] == [("3.pt", True)]


def test_a_file_that_names_code_is_not_run_among_several(tmp_path: Path) -> None:
    save(tmp_path / "1.pt", 1)
    (tmp_path / "2.pt").write_bytes(files.pickled(files.Writes(tmp_path / "made")))
    report = ns.postmortem(tmp_path)
    assert not (tmp_path / "made").exists()
    assert list(reasons(report)) == ["2.pt"]


@pytest.mark.parametrize("argument", [{"step": 3}, {"earlier": "a.pt"}, {"optimizer": "a.pt"}])
def test_arguments_for_one_checkpoint_are_refused_with_several(argument: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path / "a.pt", 1)
    save(tmp_path / "b.pt", 2)
    with pytest.raises(UsageError, match="one checkpoint with argument"):
        ns.postmortem(tmp_path, **argument)


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))


def test_model_and_data_are_used_at_each_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        state = weights()
        state["0.bias"].fill_(2.0)
        if step > 1:
            state["0.bias"][2] = -99.0  # dead for every input in the box from the second on
        if step < 3:
            state["0.bias"][4] = -99.0  # and until the second
        save(tmp_path / f"{step}.pt", step, state)
    batches = [torch.rand(500, 6)]
    report = ns.postmortem(tmp_path, model=model, data=batches, box=(0.0, 1.0), wake_seconds=0)
    layer = report.timeline.layers[0]
    assert [report.to_dict()["timeline"]["layers"][0]["events"][key] for key in ("neuron", "event", "basis")] == [
        [4, 2, 4],
        ["died", "died", "revived"],
        ["proved", "proved", "measured"],
    ]
    assert (layer.earliest.tolist(), layer.latest.tolist()) == ([-1, 1, 3], [1, 2, 3])
    with pytest.raises(UsageError, match="gone through once for each of 3"):
        ns.postmortem(tmp_path, model=model, data=iter(batches))


def test_the_check_judges_the_last_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        state = weights()
        if step == 1:
            state["0.bias"][:3] = -99.0
        save(tmp_path / f"{step}.pt", step, state)
    rest = ["--model", f"{__name__}:model", "--box", "0", "1", "--wake", "0", "--fail-above", "0"]
    first, last = str(tmp_path / "1.pt"), str(tmp_path / "2.pt")
    assert cli.main(["postmortem", last, first, *rest]) == 0
    assert cli.main(["postmortem", first, *rest]) == 1
