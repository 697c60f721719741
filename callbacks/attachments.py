"""Gives a run's files (the page, the overview picture) to Weights & Biases, MLflow or Comet."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["attach_files", "tracker_of"]


def tracker_of(logger: Any) -> tuple[str, Any] | None:
    """Return which tracker a logger of Lightning or a callback of transformers writes to, and what takes its files.

    Args:
        logger: The logger or callback; subclasses of theirs are known by their bases' names.

    Returns:
        ``wandb`` and a run, ``mlflow`` and a client with the run's id (``None`` = the active run), or ``comet`` and an
        experiment; ``None`` for every other logger.
    """
    names = {kind.__name__ for kind in type(logger).__mro__}
    if "WandbLogger" in names:
        return "wandb", logger.experiment
    if "WandbCallback" in names:
        return "wandb", getattr(getattr(logger, "_wandb", None), "run", None)
    if "MLFlowLogger" in names:
        return "mlflow", (logger.experiment, logger.run_id)
    if "MLflowCallback" in names:
        return "mlflow", (getattr(logger, "_ml_flow", None), None)
    if "CometLogger" in names:
        return "comet", logger.experiment
    if "CometCallback" in names:
        return "comet", getattr(logger, "_experiment", None)
    return None


def attach_files(tracker: tuple[str, Any], files: Sequence[Path]) -> None:
    """Attach HTML pages and pictures to a run.

    Args:
        tracker: As :func:`tracker_of` returns it.
        files: Their paths; the folder may be deleted afterwards.
    """
    kind, target = tracker
    if kind == "mlflow":
        client, run = target
        for file in files:
            if client is not None:
                client.log_artifact(*(() if run is None else (run,)), str(file), "neuronscope")
    elif kind == "comet" and target is not None:
        for file in files:
            target.log_asset(str(file), file_name=f"neuronscope/{file.name}", copy_to_tmp=True)
    elif kind == "wandb" and target is not None:
        wandb = sys.modules["wandb"]
        media = {".html": lambda file: wandb.Html(file.read_text(encoding="utf-8"), inject=False)}
        shown = {
            f"neuronscope/{file.stem}_{file.suffix[1:]}": media.get(file.suffix, lambda at: wandb.Image(str(at)))(file)
            for file in files
        }
        target.log(shown)
