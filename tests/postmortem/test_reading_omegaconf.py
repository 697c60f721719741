"""Settings of omegaconf in a Lightning checkpoint are read as plain data, without importing or running omegaconf."""

from __future__ import annotations

import collections
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import neuronscope as ns
from neuronscope.checkpoints.formats.build_checkpoint import find_hyperparameters
from neuronscope.checkpoints.formats.safe_globals import AttributesPlaceholder
from neuronscope.checkpoints.open_checkpoint import open_checkpoint

CLASSES = ("dictconfig.DictConfig", "listconfig.ListConfig", "base.ContainerMetadata", "base.Metadata", "nodes.AnyNode")


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, type]]:
    """Classes of the names that omegaconf 2.3 pickles, with the attributes that it pickles them with."""
    found = {}
    for full in CLASSES:
        module, _, name = f"omegaconf.{full}".rpartition(".")
        found[name] = type(name, (), {"__module__": module})
        held = sys.modules.get(module) or ModuleType(module)
        setattr(held, name, found[name])
        monkeypatch.setitem(sys.modules, module, held)
    monkeypatch.setitem(sys.modules, "omegaconf", ModuleType("omegaconf"))
    return found


def configured(kinds: dict[str, type], value: Any, key: Any = None, parent: Any = None) -> Any:
    """A container or a node of omegaconf that holds a value."""
    nested = isinstance(value, (dict, list))
    made = kinds["AnyNode" if not nested else "DictConfig" if isinstance(value, dict) else "ListConfig"]()
    metadata = kinds["ContainerMetadata" if nested else "Metadata"]()
    vars(metadata).update(ref_type=typing.Any, object_type=dict if nested else None, optional=True, key=key, flags={})
    vars(metadata).update(flags_root=False, resolver_cache=collections.defaultdict(dict), element_type=typing.Any)
    vars(made).update(_metadata=metadata, _parent=parent)
    if not nested:
        made._val = value
        return made
    items = value.items() if isinstance(value, dict) else enumerate(value)
    inner = {name: configured(kinds, one, name, made) for name, one in items}
    made._content = inner if isinstance(value, dict) else list(inner.values())
    return made


SETTINGS = {"width": 7, "name": "a", "inner": {"sizes": [1, 2.5, None]}, "same": "${width}"}
READ = {"width": 7, "name": "a", "inner": {"sizes": [1, 2.5, None]}}


def test_settings_are_plain_data_and_references_are_left_out(tmp_path: Path, kinds: dict[str, type]) -> None:
    network = nn.Sequential(nn.Linear(6, 7), nn.ReLU())
    saved = {"pytorch-lightning_version": "2.5.0", "state_dict": network.state_dict(), "global_step": 5}
    torch.save({**saved, "hyper_parameters": configured(kinds, SETTINGS)}, tmp_path / "a.ckpt")
    torch.save({**saved, "hyper_parameters": {"cfg": configured(kinds, READ), "width": 7}}, tmp_path / "b.ckpt")
    for full in CLASSES:
        del sys.modules[f"omegaconf.{full}".rpartition(".")[0]].__dict__[full.rpartition(".")[2]]
    assert open_checkpoint(tmp_path / "a.ckpt", trust=False).hyperparameters == READ
    assert open_checkpoint(tmp_path / "b.ckpt", trust=False).hyperparameters == {"cfg": READ, "width": 7}

    class Net(nn.Sequential):
        def __init__(self, width: int, inner: dict[str, Any]) -> None:
            assert inner["sizes"] == [1, 2.5, None]
            super().__init__(nn.Linear(6, width), nn.ReLU())

    assert ns.postmortem(tmp_path / "a.ckpt", Net)["0"].neurons == 7


def test_a_circle_ends() -> None:
    one, other = (AttributesPlaceholder("omegaconf.nodes.AnyNode") for _ in range(2))
    one.state, other.state = {"_val": other}, {"_val": one}
    assert find_hyperparameters({"hyper_parameters": {"a": one, "b": 1}}) == {"b": 1}
    one.state = {"_content": [one]}
    assert find_hyperparameters({"hyper_parameters": one}) == {}


def test_containers_are_copied_with_pythons_own_types() -> None:
    class Sizes(NamedTuple):
        width: int
        depths: list[int]

    node = AttributesPlaceholder("omegaconf.listconfig.ListConfig")
    node.state = {"_content": [1]}  # no set can hold the list that it stands for
    kept = {"a": {node}, "b": {(1, 2)}, "c": Sizes(3, [4])}
    assert find_hyperparameters({"hyper_parameters": kept}) == {"b": {(1, 2)}, "c": (3, [4])}
