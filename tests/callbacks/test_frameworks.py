"""The monitor is a true callback of whichever Lightning the Trainer comes from, whatever is imported first."""

from __future__ import annotations

import subprocess
import sys

import pytest

FIT = """
import importlib, sys, warnings
warnings.simplefilter("ignore")
{hide}
for name in {order!r}:
    if name == "monitor":
        from neuronscope.callbacks import DeadNeuronMonitor
    else:
        importlib.import_module(name)
from tests.callbacks.networks import batches, network, trainer
for framework in {used!r}:
    monitor = DeadNeuronMonitor(every_n_steps=1)
    assert isinstance(monitor, importlib.import_module(framework).Callback)
    trainer(monitor, framework=framework).fit(network(framework), batches(2), batches(1))
    assert monitor.census()["first/relu"].positions == 2 * 2 * 8, framework
print("well")
"""
HIDE = "sys.modules[{name!r}] = None"
OLD, NEW = "pytorch_lightning", "lightning.pytorch"

CASES = {
    "only pytorch_lightning, after us": (("monitor", OLD), (OLD,), "lightning"),
    "only lightning": ((NEW, "monitor"), (NEW,), OLD),
    "both, between them": ((OLD, "monitor", NEW), (OLD, NEW), None),
    "both, after us": (("monitor", NEW, OLD), (OLD, NEW), None),
}


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("order", "used", "hidden"), CASES.values(), ids=CASES)
def test_a_monitor_is_a_callback_of_the_users_trainer(
    order: tuple[str, ...], used: tuple[str, ...], hidden: str | None
) -> None:
    hide = HIDE.format(name=hidden) if hidden else ""
    done = run(FIT.format(order=order, used=used, hide=hide))
    assert done.stdout.strip().endswith("well"), done.stderr


def test_without_lightning_the_error_names_the_command() -> None:
    hide = "\n".join(HIDE.format(name=name) for name in (OLD, "lightning"))
    code = f"import sys\n{hide}\nfrom neuronscope.callbacks import DeadNeuronMonitor"
    done = run(code)
    assert done.returncode == 1
    assert "MissingExtraError" in done.stderr
    assert "pip install pytorch-lightning" in done.stderr


def test_a_user_can_derive_from_the_monitor() -> None:
    from neuronscope.callbacks import DeadNeuronMonitor

    class Mine(DeadNeuronMonitor):
        """A user's."""

    assert Mine().state_key.startswith("test_a_user_can_derive_from_the_monitor.<locals>.Mine(WatchOptions(")
    assert Mine().state_key != Mine(sites="fc*").state_key
