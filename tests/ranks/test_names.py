"""Sites keep their names in wrappers, nested ones too; a run under the real ones is in ``test_combinations.py``."""

from __future__ import annotations

import pytest
from torch import nn

from neuronscope.attach.module_paths import model_name, named_sites_path, own_class, walk


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("_fsdp_wrapped_module.layers.0.act", "layers.0.act"),
        ("_fsdp_wrapped_module.layers.0._fsdp_wrapped_module.act", "layers.0.act"),
        ("layers.0._checkpoint_wrapped_module._fsdp_wrapped_module.act", "layers.0.act"),
        ("_orig_mod._fsdp_wrapped_module.act", "act"),
        ("my_fsdp_wrapped_module.act", "my_fsdp_wrapped_module.act"),
    ],
)
def test_the_prefixes_of_fsdp_are_left_out_of_names(path: str, name: str) -> None:
    assert named_sites_path(path) == name


class FullyShardedDataParallel(nn.Module):
    """Holds its module as torch's class of this name does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module


def test_names_are_plain_in_nested_wrappers() -> None:
    inner = nn.Sequential(FullyShardedDataParallel(nn.Sequential(nn.Linear(2, 2), nn.ReLU())))
    wrapped = FullyShardedDataParallel(inner)
    assert model_name(wrapped) == "Sequential"
    assert [path for path, module in walk(wrapped) if isinstance(module, nn.ReLU)] == ["0.1"]


def test_the_class_of_an_unwrapped_module_is_its_own() -> None:
    assert own_class(nn.ReLU()) is nn.ReLU
