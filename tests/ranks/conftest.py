"""The runs of several processes that the tests of this folder look at: each number of ranks is started once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.ranks.spawning import together

ONE = ("ddp", "fsdp")
TWO = (*ONE, "tensor", "tensor_distributed")
FOUR = (*TWO, "both")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    return tmp_path_factory.mktemp("ranks")


class Runs(dict[int, list[dict[str, Any]]]):
    """What each rank gave, by the number of ranks; started when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __missing__(self, world: int) -> list[dict[str, Any]]:
        self[world] = together(self.folder, world, *{1: ONE, 2: TWO, 4: FOUR}[world])
        return self[world]


@pytest.fixture(scope="session")
def runs(folder: Path) -> Runs:
    return Runs(folder)
