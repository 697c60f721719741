"""What all tests share: seeds, what is skipped where, and the networks of others."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

# One profile everywhere: the first call of a torch operator is slow, so no deadline; on CI the same examples each time.
hypothesis.settings.register_profile(
    "house",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("house")


# Inductor compiles in processes of its own, each of which imports torch; here the kernels are few.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# And processes that write kernels to the same folder at the same time were seen to end with a signal (pytest -n).
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    kernels = Path(tempfile.gettempdir()) / f"torchinductor_{Path.home().name}_{worker}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kernels))


def pytest_configure(config: pytest.Config) -> None:
    gc.set_threshold(10_000)  # at the usual 700 it took a fifth of the time of imports, an eighth of torch.compile's
    # Several of us may run at once (pytest -n), and what a test says must not depend on that. Lightning's DDP takes all
    # cores where the variable is not set, and keeps them.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    # pytest listens to each logger that does not propagate; torch's compiler would tell it of each of its steps.
    logging.getLogger("torch.__trace").propagate = True
    _reach_networks()
    _reach_specimens()


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in a hook of the same name
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skips = {"browser": _no_browser(), "gpu": None if torch.cuda.is_available() else "no CUDA device"}
    for item in items:
        group = _shared_by(item)
        if group:  # one worker makes the fixture once (pytest -n 2)
            item.add_marker(pytest.mark.xdist_group(group))
        for marker, reason in skips.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Spare the garbage collector the objects of all imported modules, which it would walk again and again."""
    global _folder
    if item.path.parent != _folder:  # tests of another folder than the last one: its packages are imported by now
        _folder = item.path.parent
        gc.collect()
        gc.freeze()


def _shared_by(item: pytest.Item) -> str | None:
    """Return the file or folder whose tests share a fixture with this test; None if it shares none."""
    if item.path.parent.name == "ranks":  # processes: all of them one after another
        return "tests/ranks"
    assert isinstance(item, pytest.Function)
    fixtures = [each for found in item._fixtureinfo.name2fixturedefs.values() for each in found]
    homes = {fixture.baseid for fixture in fixtures if fixture.scope in ("module", "session") and fixture.baseid}
    return min(homes, key=len, default=None)


@pytest.fixture
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have torch.compile begin with nothing compiled, and leave nothing.

    For its log, torch times the guards of each graph, for which it flushes the processor's caches: a third of the time
    in which it compiles a small graph. And for its cache on disk it writes each graph as a text, though ``aot_eager``
    has no such cache. Here it does neither.
    """
    import torch._dynamo.guards

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch._dynamo.guards, "profile_guard_manager", lambda *guards: 0.0, raising=False)
    with contextlib.suppress(ImportError):  # an older torch
        from torch._functorch._aot_autograd import graph_compile

        monkeypatch.setattr(graph_compile, "_log_joint_graph", lambda *graph: None, raising=False)
        monkeypatch.setattr(graph_compile, "_log_fw_bw_graphs", lambda *graphs: (None, None), raising=False)
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A test leaves torch as many threads as it found: the tests after it would take many times as long with others."""
    before = torch.get_num_threads()
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == before


@pytest.fixture(autouse=True)
def _user_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A module that a test wrote and imported is forgotten: the next test may write another one of the same name."""
    before = set(sys.modules)
    yield
    for name in sys.modules.keys() - before:
        file = getattr(sys.modules[name], "__file__", None)
        if isinstance(file, str) and tmp_path_factory.getbasetemp() in Path(file).parents:
            del sys.modules[name]


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same random numbers, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # code under test may draw from numpy's global generator, as users' loops do
    torch.manual_seed(0)


def _no_browser() -> str | None:
    browsers = ("chromium", "chromium-browser", "google-chrome")
    if any(shutil.which(name) for name in browsers) and shutil.which("chromedriver"):
        return None
    if os.environ.get("NEURONSCOPE_REQUIRE_BROWSER"):
        raise pytest.UsageError("NEURONSCOPE_REQUIRE_BROWSER is set, but there is no Chromium with its chromedriver.")
    return "no Chromium with its chromedriver (Debian: apt-get install chromium chromium-driver)"


def _reach_networks() -> None:
    """Make torchvision and timm importable, where ``make test`` has put them into ``networks/`` of the environment.

    On Linux the ordinary torchvision is a CUDA build. Beside a CPU build of torch its compiled operators cannot be
    loaded, and its import fails for want of two operator schemas that no network here calls: they are defined first.
    Importing Lightning then works too (torchmetrics imports torchvision where it finds one).
    """
    folder = Path(sys.prefix) / "networks"
    if not folder.is_dir():
        return
    sys.path.append(str(folder))
    try:
        local = metadata.version("torchvision").partition("+")[2]
    except metadata.PackageNotFoundError:
        return
    if sys.platform == "linux" and torch.version.cuda is None and local != "cpu":
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)


def _reach_specimens() -> None:
    """Make the files findable that ``make test`` has put into ``specimens/`` of the environment."""
    folder = Path(sys.prefix) / "specimens"
    if folder.is_dir():
        sys.path.append(str(folder))


_folder: Path | None = None
_LIBRARIES: list[torch.library.Library] = []  # a library's schemas go when it is collected
