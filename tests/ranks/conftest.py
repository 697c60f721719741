"""The runs of several processes that the tests of this folder look at: each number of ranks is started once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.ranks.spawning import together

COMBINED = (
    *("ddp", "fsdp", "fsdp1", "lightning_ddp", "lightning_fsdp", "hugging_ddp", "hugging_fsdp"),
    *("accelerate_ddp", "accelerate_fsdp"),
)
TASKS = {
    1: COMBINED,
    2: (
        *COMBINED,
        *("tensor", "tensor_distributed", "tensor_compiled", "elastic", "uneven", "other_widths"),
        *("uneven_and_validated", "fault", "retired"),
        *("both_train", "both_train_in_short_windows", "both_train_observed_at_times"),
        *("steady", "apart", "unsure_window", "late_site", "other_order", "mixed_phases", "one_goes_on"),
        "inference_on_one_rank",
        *("fire_apart", "one_sees_nothing", "one_scans", "sequence_parallel"),
        *("accelerate_by_hand", "accelerate_before_and_after", "hugging_counts", "hugging_resumes"),
        *("lightning_fault", "hugging_fault", "sums"),
        *("accelerate_tried", "hugging_tried", "lightning_tried"),
    ),
    4: (
        *COMBINED,
        *("lightning_model_parallel", "tensor_distributed", "both", "elastic"),
        *("uneven", "uneven_and_validated", "fault", "retired", "sums"),
    ),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


class Runs(dict[int, list[dict[str, Any]]]):
    """What each rank gave, by the number of ranks; started once, when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.failed: dict[int, BaseException] = {}

    def __missing__(self, world: int) -> list[dict[str, Any]]:
        if world == 2:
            _ = self[4]  # what four ranks saved is what two go on from
        if world in self.failed:
            raise self.failed[world]
        try:
            self[world] = together(self.folder, world, *TASKS[world])
        except BaseException as error:
            self.failed[world] = error
            raise
        return self[world]


@pytest.fixture(scope="session")
def runs(folder: Path) -> Runs:
    return Runs(folder)
