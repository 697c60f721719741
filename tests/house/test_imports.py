"""What an import must not load. Each runs in a fresh interpreter: here torch has long been imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

FRAMEWORKS = ("torch", "lightning", "pytorch_lightning", "transformers")
HEAVY = (*FRAMEWORKS, "tensorboard", "tensorflow", "sklearn", "matplotlib")

CASES = {
    # TensorBoard imports the package to look for a plugin, at every start.
    "neuronscope": (*HEAVY, "numpy", "PIL", "rich", "jinja2"),
    "neuronscope.errors": (*HEAVY, "numpy"),
    # The table at hand when a user asks for help, or reads a report where torch is not installed.
    "neuronscope.cli": HEAVY,
    "neuronscope.callbacks": HEAVY,
    "neuronscope.report.report": HEAVY,
    "neuronscope.judge.verdicts": HEAVY,
    "neuronscope.judge.diagnosis": HEAVY,
    "neuronscope.checkpoints": (*HEAVY, "numpy"),
    "neuronscope.checkpoints.verdict.combine": HEAVY,
    "neuronscope.checkpoints.checkpoint_commands": HEAVY,
    "neuronscope.checkpoints.writers.postmortem_html": HEAVY,
    "neuronscope.checkpoints.writers.postmortem_markdown": HEAVY,
    "neuronscope.checkpoints.writers.postmortem_terminal": HEAVY,
    "neuronscope.checkpoints.postmortem_report": HEAVY,
    "neuronscope.writers.html": HEAVY,
    "neuronscope.writers.markdown": HEAVY,
    "neuronscope.writers.report_bytes": HEAVY,
    "neuronscope.writers.terminal": HEAVY,
    # By its entry point it is imported whenever TensorBoard starts.
    "neuronscope.writers.tensorboard_plugin.loader": (*FRAMEWORKS, "sklearn", "matplotlib", "jinja2", "rich"),
    "neuronscope.writers.tensorboard_plugin.plugin": (*FRAMEWORKS, "sklearn", "matplotlib", "rich"),
    # One framework a file.
    "neuronscope.scope": ("lightning", "pytorch_lightning", "transformers", "tensorboard", "rich", "jinja2", "PIL"),
}


@pytest.mark.parametrize(("module", "unwanted"), CASES.items(), ids=CASES)
def test_an_import_loads_nothing_that_it_does_not_need(module: str, unwanted: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & set(unwanted) == set()
