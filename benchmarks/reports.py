"""The report's page: the time to write it, its size, and how soon a browser shows the map of the network."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.tables import Table, milliseconds, size
from neuronscope.report.report import Report
from tests.writers import sample_reports as samples

__all__ = ["tables"]

#: Layers, neurons of each, and windows of their history.
NETWORKS = ((12, 4096, 200), (300, 512, 60), (5_000, 64, 60))
#: Seconds within which a page must be shown.
PATIENCE_S = 60.0


def tables(*, quick: bool = False) -> Iterator[Table]:
    """One row a network."""
    table = Table(
        "The report's page",
        ("network", "windows", "written in", "size", "map of the network shown after", "all layers unpacked after"),
        note="Synthetic reports in which a fifth of the neurons are born dead, died, revived or dormant. Written: the "
        "least processor time of three. Shown and unpacked: since the page was opened, the median of three in headless "
        "Chromium, as far as there is one.",
    )
    browser = None if quick else _browser()
    try:
        for layers, neurons, windows in NETWORKS[: 1 if quick else None]:
            report = _report(*((2, 64, 4) if quick else (layers, neurons, windows)))
            text, took = "", []
            for _ in range(1 if quick else 3):
                began = time.process_time()
                text = report.to_html()
                took.append(time.process_time() - began)
            opened = ["–", "–"] if browser is None else [milliseconds(at) for at in _opened(browser, text)]
            name = f"{layers:,} layers × {neurons:,}"
            table.rows.append((name, str(windows), milliseconds(min(took)), size(len(text.encode())), *opened))
    finally:
        if browser is not None:
            browser.quit()
    yield table


def _report(layers: int, neurons: int, windows: int) -> Report:
    share = neurons // 20
    fate = samples.Fate(born=share, died=share, revived=share, dormant=share)
    kinds = [samples.site("x", neurons, fate, windows=windows, seed=seed) for seed in range(min(layers, 12))]
    names = (f"blocks.{layer}.mlp.fc1/relu" for layer in range(layers))
    return samples.report(*(samples.renamed(kinds[at % len(kinds)], name) for at, name in enumerate(names)))


def _browser() -> Any:
    """Start Chromium; ``None`` if it, its driver or selenium is missing."""
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None or shutil.which("chromedriver") is None or importlib.util.find_spec("selenium") is None:
        return None
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless", "--no-sandbox", "--disable-gpu"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))


def _opened(browser: Any, text: str) -> list[float]:
    """Return the seconds until the map of the network is drawn, and until every layer is unpacked."""
    found: tuple[list[float], list[float]] = ([], [])
    from selenium.webdriver.support.wait import WebDriverWait

    waits = ("document.querySelector('#overview[data-drawn]')", "document.documentElement.dataset.ready")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "page.html"
        path.write_text(text, encoding="utf-8")
        for _ in range(3):
            browser.get("about:blank")
            browser.get(path.as_uri())
            for wait, seconds in zip(waits, found, strict=True):
                WebDriverWait(browser, PATIENCE_S, poll_frequency=0.01).until(_is_true(wait))
                seconds.append(browser.execute_script("return performance.now()") / 1e3)
    return [sorted(seconds)[1] for seconds in found]


def _is_true(expression: str) -> Callable[[Any], bool]:
    return lambda browser: bool(browser.execute_script(f"return Boolean({expression})"))
