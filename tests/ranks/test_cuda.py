"""DDP, FSDP2 and FSDP1 on a device, one rank: names stripped, counts those of the recording, weights unchanged.

The same code on the CPU over gloo, and on a GPU over nccl where one is at hand; in processes of their own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from tests.ranks.parallel import CASES
from tests.ranks.spawning import together
from tests.ranks.test_strategies import check_network

STRATEGIES = ("ddp", "fsdp", "fsdp1")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_one_rank_on_a_cuda_device_is_counted(tmp_path: Path, device: str) -> None:
    if device == "cuda" and not dist.is_nccl_available():
        pytest.skip("this torch has no nccl")
    (given,) = together(tmp_path, 1, *STRATEGIES, device=device)
    for strategy in STRATEGIES:
        for case in CASES:
            assert given[strategy][case]["model"] == "Network"
            check_network([given[strategy][case]], case, 1)
