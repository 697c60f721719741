"""Answer the requests of TensorBoard's tab: which runs have reports, and the page of one or of two of them.

Event files are data. A run without our data is not listed, and what is damaged, foreign or from another version gives a
page with one sentence. All data comes through TensorBoard's data provider, one tag a request.
"""

from __future__ import annotations

import functools
import json
import re
from importlib.resources import files
from typing import Any

import numpy as np
from markupsafe import escape
from tensorboard.backend import http_util
from tensorboard.data import provider
from tensorboard.plugin_util import context as context_of
from tensorboard.plugin_util import experiment_id
from tensorboard.plugins.base_plugin import FrontendMetadata, TBContext, TBPlugin
from werkzeug.wrappers import Request, Response

from neuronscope.errors import ReportError
from neuronscope.report.report import Report
from neuronscope.writers import html
from neuronscope.writers.formatting import count, visible
from neuronscope.writers.report_bytes import from_bytes
from neuronscope.writers.tensorboard.event_file import EVENT_FOLDER
from neuronscope.writers.tensorboard.tags import PLUGIN_NAME, TAB_TAG

__all__ = ["Plugin"]

_TAG = re.compile(rf"neuronscope/(\S+_)?{TAB_TAG}")


class Plugin(TBPlugin):  # type: ignore[misc]  # TensorBoard ships no types
    """The tab *Neuronscope*."""

    plugin_name = PLUGIN_NAME

    def __init__(self, context: TBContext) -> None:
        self._provider = context.data_provider

    def get_plugin_apps(self) -> dict[str, Any]:
        """Return the routes, below ``data/plugin/neuronscope``."""
        apps = {"/frame.js": self._frame, "/runs": self._runs, "/page": self._page}
        return {route: Request.application(app) for route, app in apps.items()}

    def is_active(self) -> bool:
        """Whether the tab shows although no run has data of ours: no. TensorBoard asks only then."""
        return False

    def frontend_metadata(self) -> FrontendMetadata:
        """Return where the tab's module is, and the tab's name."""
        return FrontendMetadata(es_module_path="/frame.js", tab_name="Neuronscope")

    def _frame(self, request: Request) -> Response:
        script = (files("neuronscope.writers.tensorboard_plugin") / "frame.js").read_text(encoding="utf-8")
        return _respond(request, script, "application/javascript")

    def _runs(self, request: Request) -> Response:
        """Answer with the reports that there are: run, its name, tag, phase and step, in the order of names."""
        found = self._provider.list_tensors(
            context_of(request.environ), experiment_id=experiment_id(request.environ), plugin_name=PLUGIN_NAME
        )
        reports = [
            {
                "run": run,
                "name": _name(run),
                "tag": tag,
                "phase": _phase(tag, series.plugin_content),
                "step": series.max_step,
                "time": series.max_wall_time,
            }
            for run, tags in found.items()
            for tag, series in tags.items()
            if _TAG.fullmatch(tag)
        ]
        reports.sort(key=lambda one: (one["name"], one["phase"] != "train", one["phase"]))
        return _respond(request, reports, "application/json")

    def _page(self, request: Request) -> Response:
        """Answer with the page of the report at ``run`` and ``tag``, compared with that at ``run2`` and ``tag2``."""
        asked = request.args
        try:
            data, against = self._read(request, ""), self._read(request, "2") if asked.get("run2") is not None else None
            page = _draw(data, against, _name(asked["run"]), _name(asked.get("run2", "")))
            code = 200
        except ReportError as error:
            page, code = _apology(str(error)), 404
        scripts = re.findall(r"script-src 'sha256-([^']+)'", page[:2000])
        return _respond(request, page, "text/html", code=code, csp_scripts_sha256s=scripts)

    def _read(self, request: Request, suffix: str) -> bytes:
        """Return the newest bytes of the report that a request names in ``run`` and ``tag``, each with a suffix."""
        run, tag = request.args.get(f"run{suffix}", ""), request.args.get(f"tag{suffix}", "")
        found = self._provider.read_tensors(
            context_of(request.environ),
            experiment_id=experiment_id(request.environ),
            plugin_name=PLUGIN_NAME,
            downsample=1,
            run_tag_filter=provider.RunTagFilter(runs=[run], tags=[tag]),
        )
        series = found.get(run, {}).get(tag, [])
        if not _TAG.fullmatch(tag) or not series:
            raise ReportError(f"Expected a report in run {_name(run)!r}, but TensorBoard has none there (any more).")
        tensor = series[-1].numpy
        if not isinstance(tensor, np.ndarray) or tensor.dtype != np.uint8 or tensor.ndim != 1:
            raise ReportError(f"Expected a report in run {_name(run)!r}, but it holds something else.")
        return tensor.tobytes()


def _respond(request: Request, content: Any, content_type: str, **options: Any) -> Response:
    answer: Response = http_util.Respond(request, content, content_type, **options)
    return answer


@functools.lru_cache(maxsize=8)
def _draw(data: bytes, against: bytes | None, name: str, other: str) -> str:
    """Return the page of a report, compared with another one if there is one."""
    report = from_bytes(data, f"run {name!r}")
    before: Report | None = None
    said = ""
    if against is not None:
        before = from_bytes(against, f"run {other!r}")
        said = f"run {other}, phase {before.phase}, at step {count(before.global_step)}"
    return html.render(report, before, said)


def _name(run: str) -> str:
    """Return a run's name for a person, without the folder of our event file."""
    shown = re.sub(rf"(^|/){EVENT_FOLDER}$", "", run)
    return visible(shown if shown not in ("", ".") else ".")


def _phase(tag: str, content: bytes | None) -> str:
    """Return the phase in a tag's content, or else the part of the tag that is nearly the phase."""
    try:
        phase = json.loads(content or b"")["phase"]
    except (LookupError, TypeError, ValueError):
        phase = None
    match = _TAG.fullmatch(tag)
    return visible(phase) if isinstance(phase, str) else ((match and match[1]) or "train_")[:-1]


def _apology(sentence: str) -> str:
    style = "body{font:15px/1.5 system-ui,sans-serif;margin:2rem;max-width:70ch;color:CanvasText;background:Canvas}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        f"<title>Neuronscope</title><style>{style}</style></head><body><p>{escape(visible(sentence))}</p></body></html>"
    )
