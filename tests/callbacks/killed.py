"""A training that is killed: ``python -m tests.callbacks.killed FOLDER STEPS SAVE_STEPS [KILLED_AT]``.

It resumes from the folder's last checkpoint, if there is one, and leaves its counts in the folder when it ends.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from neuronscope.callbacks.transformers import DeadNeuronCallback
from neuronscope.judge.verdicts import Policy
from tests.callbacks.hugging import gpt2, trainer

#: A window is sure with log(0.05) / log(0.7) = 8.4 examples: three observed steps of 4 sentences.
OPTIONS: dict[str, Any] = {"every_n_steps": 2, "window_steps": 4, "policy": Policy(max_rate=0.3)}
COUNTS = "counts.pt"


class Killer(TrainerCallback):
    """Kills the process when a step begins.

    Args:
        step: The number of steps before it; −1 = never.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, steps: int, save_steps: int, killed_at: int = -1) -> dict[str, Any]:
    """Train on from the last checkpoint, and return what was counted."""
    callback = DeadNeuronCallback(**OPTIONS)
    saving = {"save_strategy": "steps", "save_steps": save_steps, "eval_strategy": "steps", "eval_steps": 4}
    run = trainer(folder, callback, Killer(killed_at), model=gpt2(0.0), max_steps=steps, save_total_limit=2, **saving)
    folder.mkdir(exist_ok=True)
    run.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    assert run.state.global_step == steps
    return callback.state_dict()["scope"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, *numbers = sys.argv[1:]
    torch.save(train(Path(where), *map(int, numbers)), Path(where) / COUNTS)
