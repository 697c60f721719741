"""The tab's plugin, asked as TensorBoard's front end asks it, over both of TensorBoard's loaders."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuronscope.report.report import Report
from neuronscope.writers.html import render
from neuronscope.writers.report_bytes import to_bytes
from neuronscope.writers.tensorboard import EventFile, append
from neuronscope.writers.tensorboard.event_file import EncodedEvents

from . import samples

pytest.importorskip("tensorboard.backend.application", reason="TensorBoard is not installed")

from tensorboard.backend import application
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.compat.proto import summary_pb2
from tensorboard.util.tensor_util import make_tensor_proto
from werkzeug.test import Client

from neuronscope.writers.tensorboard_plugin.loader import Loader

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
TAG = "neuronscope/report"
HOSTILE = "<img src=x onerror=alert(1)>"
OTHER = {"widths": (64, 128, 256, 256, 512, 300)}


def flags(**others: Any) -> Namespace:
    """The command line as TensorBoard parses it, after our loader has seen it."""
    found = Namespace(**{"logdir": "", "samples_per_plugin": {}, "path_prefix": "", "window_title": "", **others})
    Loader().fix_flags(found)
    return found


def report_into(run: Path, report: Report, step: int) -> None:
    run.mkdir(parents=True, exist_ok=True)
    append(report, EventFile(str(run)), step, images=False, text=False, tab=True)


def tensor_into(
    run: Path, tag: str, value: Any, content: bytes = b'{"phase": "train"}', plugin: str = "neuronscope"
) -> None:
    run.mkdir(parents=True, exist_ok=True)
    events = EncodedEvents()
    metadata = summary_pb2.SummaryMetadata(
        plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name=plugin, content=content),
        data_class=summary_pb2.DATA_CLASS_TENSOR,
    )
    one = summary_pb2.Summary.Value(tag=tag, tensor=make_tensor_proto(value), metadata=metadata)
    events.add_summary(summary_pb2.Summary(value=[one]), 1)
    EventFile(str(run)).append(events.data)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with good reports, and with all that may lie there in place of one."""
    home = tmp_path_factory.mktemp("runs")
    for upto in (10, 20, 30, 40):
        for phase in ("train", "val"):
            report_into(home / "good", samples.conv_net(upto, phase=phase), 100 * upto)
    report_into(home / "other", samples.conv_net(30, **OTHER), 3000)
    backwards = EventFile(str(home / "again"))
    (home / "again").mkdir()
    for upto in (40, 10):
        append(samples.conv_net(upto), backwards, 100 * upto, images=False, text=False, tab=True)
    report_into(home / HOSTILE.replace("/", "_"), samples.conv_net(2, phase=HOSTILE), 200)
    tensor_into(home / "foreign", "loss", np.ones(3, np.float32), plugin="scalars")
    tensor_into(home / "namesake", "neuronscope.others/a", np.ones((2, 3), np.uint8))
    tensor_into(home / "floats", TAG, np.ones(3, np.float32), content=b"\xff")
    tensor_into(home / "text", TAG, b"words", content=b"[1]")
    tensor_into(home / "garbage", TAG, np.arange(256, dtype=np.uint8))
    whole = np.frombuffer(to_bytes(samples.conv_net(3)), np.uint8)
    tensor_into(home / "half", TAG, whole[: len(whole) // 2])
    newer = to_bytes(replace(samples.conv_net(3), schema_version=99))
    tensor_into(home / "newer", TAG, np.frombuffer(newer, np.uint8))
    (home / "torn" / "neuronscope").mkdir(parents=True)
    (home / "torn" / "neuronscope" / "events.out.tfevents.1.x").write_bytes(b"\x18\x00torn")
    return home


def python_loader(logs: Path) -> Iterator[Any]:
    shown = plugin_event_multiplexer.EventMultiplexer(tensor_size_guidance=flags().samples_per_plugin)
    shown.AddRunsFromDirectory(str(logs))
    shown.Reload()
    yield data_provider.MultiplexerDataProvider(shown, str(logs))


def data_server(logs: Path) -> Iterator[Any]:
    binary = pytest.importorskip(
        "tensorboard_data_server", reason="TensorBoard has no data server here"
    ).server_binary()
    from tensorboard.data import grpc_provider
    from tensorboard.data.server_ingester import _make_stub
    from tensorboard.util.grpc_util import ChannelCredsType

    kept = ",".join(f"{name}={number}" for name, number in flags().samples_per_plugin.items())
    port = logs.parent / "port"
    command = [
        binary,
        f"--logdir={logs}",
        "--reload=once",
        "--port=0",
        f"--port-file={port}",
        f"--samples-per-plugin={kept}",
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as server:
        try:
            wait_for(lambda: port.exists() and port.read_text().endswith("\n"))
            address = f"localhost:{int(port.read_text())}"
            provider = grpc_provider.GrpcDataProvider(address, _make_stub(address, ChannelCredsType.LOCAL))
            wait_for(lambda: len(listed(provider)) == 10)
            yield provider
        finally:
            server.kill()
            port.unlink(missing_ok=True)


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "the data server does not come up"
        time.sleep(0.02)


def client_of(provider: Any) -> Client:
    return Client(application.TensorBoardWSGIApp(flags(), [Loader], provider))


def listed(provider: Any) -> list[dict[str, Any]]:
    return client_of(provider).get("/data/plugin/neuronscope/runs").json or []


@pytest.fixture(scope="module", params=[python_loader, data_server], ids=["python", "data server"])
def tab(request: pytest.FixtureRequest, logs: Path) -> Iterator[Client]:
    """The plugin over one of TensorBoard's loaders."""
    for provider in request.param(logs):
        yield client_of(provider)


def page(tab: Client, run: str, tag: str = TAG, **others: str) -> Any:
    return tab.get("/data/plugin/neuronscope/page", query_string={"run": run, "tag": tag, **others})


def test_all_runs_with_reports_are_listed_and_no_others(tab: Client) -> None:
    found = tab.get("/data/plugin/neuronscope/runs").json
    assert [(one["name"], one["phase"], one["step"]) for one in found] == [
        (HOSTILE.replace("/", "_"), HOSTILE, 200),
        ("again", "train", 1000),
        ("floats", "train", 1),
        ("garbage", "train", 1),
        ("good", "train", 4000),
        ("good", "val", 4000),
        ("half", "train", 1),
        ("newer", "train", 1),
        ("other", "train", 3000),
        ("text", "train", 1),
    ]


@pytest.mark.parametrize("phase", ["train", "val"])
def test_the_newest_page_is_the_one_that_the_report_writes(tab: Client, phase: str) -> None:
    answer = page(tab, "good/neuronscope", TAG if phase == "train" else "neuronscope/val_report")
    assert answer.status_code == 200
    assert answer.text == samples.conv_net(40, phase=phase).to_html()


def test_a_run_that_begins_again_shows_its_new_beginning(tab: Client) -> None:
    assert page(tab, "again/neuronscope").text == samples.conv_net(10).to_html()


def test_the_browser_may_run_the_pages_script_and_no_other(tab: Client) -> None:
    answer = page(tab, "good/neuronscope")
    (own,) = re.findall(r"script-src '(sha256-[^']+)'", answer.text)
    policy = answer.headers["Content-Security-Policy"]
    assert own in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_two_runs_are_compared(tab: Client) -> None:
    answer = page(tab, "good/neuronscope", run2="other/neuronscope", tag2=TAG)
    name = "run other, phase train, at step 3,000"
    assert answer.text == render(samples.conv_net(40), samples.conv_net(30, **OTHER), name)
    assert f"Compared with {name}" in answer.text
    assert "Not compared: 1 layer that only one has, or whose size differs." in answer.text


@pytest.mark.parametrize(
    ("run", "sentence"),
    [
        ("floats/neuronscope", "holds something else"),
        ("text/neuronscope", "holds something else"),
        ("garbage/neuronscope", "holds something else"),
        ("half/neuronscope", "damaged"),
        ("newer/neuronscope", "schema version 3, but run &#39;newer&#39; has 99"),
        ("namesake/neuronscope", "has none there"),
        ("foreign/neuronscope", "has none there"),
        ("torn/neuronscope", "has none there"),
        ("nowhere", "has none there"),
        (HOSTILE, "has none there"),
    ],
)
def test_what_cannot_be_shown_gives_one_sentence_and_harms_nothing(tab: Client, run: str, sentence: str) -> None:
    for answer in (page(tab, run), page(tab, "good/neuronscope", run2=run, tag2=TAG)):
        assert answer.status_code == 404
        assert sentence in answer.text
        assert "<img" not in answer.text
        assert "script-src 'self' 'unsafe-eval'" in answer.headers["Content-Security-Policy"]  # none in the page itself


@pytest.mark.parametrize("tag", ["", "loss", "neuronscope/diagnosis/text_summary", "neuronscope.others/a", "../../x"])
def test_only_tags_of_reports_are_read(tab: Client, tag: str) -> None:
    assert page(tab, "namesake/neuronscope", tag).status_code == 404
    assert page(tab, "good/neuronscope", tag).status_code == 404


def test_a_request_without_a_run_is_answered(tab: Client) -> None:
    assert tab.get("/data/plugin/neuronscope/page").status_code == 404


def test_the_tab_is_shown_where_there_is_data_and_hidden_where_there_is_none(tab: Client, tmp_path: Path) -> None:
    entry = tab.get("/data/plugins_listing").json["neuronscope"]
    assert (entry["enabled"], entry["tab_name"]) == (True, "Neuronscope")
    script = tab.get(entry["loading_mechanism"]["module_path"])
    assert "export function render()" in script.text
    assert script.mimetype == "application/javascript"
    (tmp_path / "run").mkdir()
    tensor_into(tmp_path / "run", "loss", np.ones(3, np.float32), plugin="scalars")
    for provider in python_loader(tmp_path):
        empty = client_of(provider)
        assert empty.get("/data/plugins_listing").json["neuronscope"]["enabled"] is False
        assert empty.get("/data/plugin/neuronscope/runs").json == []


@pytest.mark.parametrize("given", [{}, None, {"neuronscope": 0, "images": 5}])
def test_one_report_of_each_run_and_phase_is_kept(given: Any) -> None:
    images = {"images": 5} if given else {}
    assert flags(samples_per_plugin=given).samples_per_plugin == {**images, "neuronscope": 1}


def test_the_entry_point_names_the_loader() -> None:
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    module, _, name = entries["tensorboard_plugins"]["neuronscope"].partition(":")
    assert (module, name) == (Loader.__module__, Loader.__name__)


def test_tensorboard_finds_the_plugin_of_the_installed_package(tmp_path: Path) -> None:
    # A package's metadata is what pip makes of pyproject.toml: here by hand, so that no older installation matters.
    info = tmp_path / "neuronscope-0.dist-info"
    info.mkdir()
    entry = f"{Loader.__module__}:{Loader.__name__}"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: neuronscope\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[tensorboard_plugins]\nneuronscope = {entry}\n")
    code = (
        "import sys; from tensorboard import default\n"
        "found = {each.__module__ for each in default.get_dynamic_plugins() if hasattr(each, 'fix_flags')}\n"
        "heavy = [name for name in ('torch', 'jinja2', 'neuronscope.report.report') if name in sys.modules]\n"
        f"assert {Loader.__module__!r} in found, found\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n{code}"],
        check=False, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_content_of_a_tag_is_only_asked_for_its_phase() -> None:
    from neuronscope.writers.tensorboard_plugin.plugin import _phase

    assert _phase("neuronscope/report", json.dumps({"phase": "train"}).encode()) == "train"
    assert _phase("neuronscope/val_report", None) == "val"
    assert _phase("neuronscope/my_test_report", b'{"phase": 3}') == "my_test"
    assert _phase("neuronscope/report", b"\xff") == "train"
