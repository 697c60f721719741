"""The kernels that count on GPUs, without one: in triton's interpreter against a slow twin, and compiled for three."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

#: Where `make test` installs triton; a CUDA build of torch has brought one.
FOLDER = Path(sys.prefix) / "triton"

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir() and importlib.util.find_spec("triton") is None, reason="no triton (`make test` installs it)"
)


def run(tmp_path: Path, *arguments: str, interpret: bool) -> str:
    root = Path(__file__).parents[2]
    paths = (str(root), *filter(None, (os.environ.get("PYTHONPATH"),)), str(FOLDER))
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TRITON_INTERPRET": str(int(interpret)),
        "TRITON_CACHE_DIR": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    program = (sys.executable, "-m", "tests.count.triton_program", *arguments)
    done = subprocess.run(program, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("first", "last"), [(0, 45), *(pytest.param(at, at + 185, marks=pytest.mark.slow) for at in (45, 230, 415))]
)
def test_random_tensors_are_counted_as_by_the_slow_twin(tmp_path: Path, first: int, last: int) -> None:
    assert run(tmp_path, "count", str(first), str(last), interpret=True) == f"{last - first} cases agree\n"


def test_a_watched_network_has_the_counts_of_the_cpu(tmp_path: Path) -> None:
    assert run(tmp_path, "watch", interpret=True) == "the network's counts agree\n"


def test_the_kernels_compile_for_gpus_read_wide_and_keep_subnormal_numbers(tmp_path: Path) -> None:
    # 3 GPUs × (7 shapes, 3 more types, 3 ways to add up), and 2
    assert run(tmp_path, "compile", interpret=False) == "41 kernels compiled\n"
