"""What reading a large checkpoint costs: memory beside its largest tensor, time beside that of reading the files.

Writes a synthetic sharded safetensors checkpoint into a temporary folder and reads it tensor by tensor in a process of
its own::

    python scripts/checkpoint_memory.py --gigabytes 4
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHARDS = 4
SIDE = 4096  # of a square float32 matrix: 64 MiB
BYTES = SIDE * SIDE * 4

CHILD = """
import json, sys, time
from neuronscope.checkpoints.open_checkpoint import open_checkpoint

def kilobytes(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))

def now():
    return kilobytes("VmRSS:")

before = now()
start = time.perf_counter()
checkpoint = open_checkpoint(sys.argv[1])
opened, opening = now(), time.perf_counter() - start
start = time.perf_counter()
numbers = 0
for tensor in checkpoint.tensors.values():
    numbers += tensor.read().numel()
reading = time.perf_counter() - start
peak = kilobytes("VmHWM:")
print(json.dumps({"tensors": len(checkpoint.tensors), "numbers": numbers, "opening_s": opening, "reading_s": reading,
                  "opened_kb": opened - before, "peak_kb": peak - before}))
"""


def write(folder: Path, size: int) -> list[Path]:
    """Shards of whole matrices, ``size`` bytes in all, and their index; gives the shards."""
    count = max(1, size // BYTES // SHARDS)
    block = bytes(range(256)) * (BYTES // 256)
    places, files = {}, []
    for shard in range(SHARDS):
        path = folder / f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        entries = {
            f"layers.{shard * count + at}.weight": {
                "dtype": "F32",
                "shape": [SIDE, SIDE],
                "data_offsets": [at * BYTES, (at + 1) * BYTES],
            }
            for at in range(count)
        }
        header = json.dumps(entries).encode()
        with path.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for _ in range(count):
                file.write(block)
        places |= dict.fromkeys(entries, path.name)
        files.append(path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return files


def plainly(files: list[Path]) -> tuple[float, float]:
    """Seconds that it takes to read the files a matrix at a time: into one buffer, and into new memory each time."""
    room = memoryview(bytearray(BYTES))
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass
    middle = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(BYTES):
                pass
    return middle - start, time.perf_counter() - middle


def measured(folder: Path) -> dict[str, float]:
    """What the child process that reads the checkpoint says."""
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    """Write the checkpoint, read it in several ways in turn, and tell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    told = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write(folder, int(told.gigabytes * 2**30))
        size = sum(path.stat().st_size for path in files)
        print(f"{size / 2**30:.2f} GiB in {len(files)} files, largest tensor {BYTES / 2**20:.0f} MiB")
        for _ in range(told.rounds):
            (one_buffer, new_memory), child = plainly(files), measured(folder)
            print(
                f"files alone: {one_buffer:.2f} s into one buffer, {new_memory:.2f} s into new memory; opened in "
                f"{child['opening_s']:.3f} s; {child['tensors']} tensors in {child['reading_s']:.2f} s; memory at most "
                f"{child['peak_kb'] / 1024:.0f} MiB above that before"
            )


if __name__ == "__main__":
    main()
