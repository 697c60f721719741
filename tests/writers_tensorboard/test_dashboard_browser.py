"""TensorBoard's own pages in a real browser: our charts and pictures are there, in light and in dark mode."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from neuronscope.writers.tensorboard import Dashboard

from .samples import conv_net

pytest.importorskip("selenium", reason="selenium is not installed")
from tests.writers.browser import started

tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="TensorBoard is not installed")

pytestmark = [pytest.mark.browser, pytest.mark.slow]

PATIENCE_S = 60.0
SCREENSHOTS = os.environ.get("NEURONSCOPE_SCREENSHOTS")  # a folder, for people who want to look


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A TensorBoard on loopback that shows a run with two phases; stopped at the end whatever happens."""
    logs = tmp_path_factory.mktemp("runs")
    with tensorboard.SummaryWriter(str(logs / "conv")) as writer:
        dashboard = Dashboard(writer)
        for upto in range(2, 41, 2):
            rich = upto % 10 == 0
            for phase in ("train", "val"):
                assert dashboard.write(conv_net(upto, phase=phase), images=rich, text=rich, tab=rich)
    yield from served(
        logs,
        [sys.executable, "-m", "tensorboard.main"],
        lambda url: "neuronscope/dead_pct" in fetch(f"{url}/data/plugin/scalars/tags"),
    )


def served(logs: Path, program: Sequence[str], loaded: Callable[[str], bool]) -> Iterator[str]:
    """Yield the address of a TensorBoard on loopback once it has loaded its runs, and stop it at the end.

    Args:
        logs: The folder of the runs.
        program: The command that starts it, without options.
        loaded: Given the address, whether the runs are loaded.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*program, "--logdir", str(logs), "--host", "127.0.0.1", "--port", str(port)]
    with (logs / "tensorboard.log").open("wb") as log:
        server = subprocess.Popen([*command, "--load_fast", "false", "--reload_interval", "1"], stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: loaded(url), "TensorBoard to load the runs")
        yield url
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(10)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A fresh headless Chromium."""
    driver = started(tmp_path_factory.mktemp("profile"), "--window-size=1500,1150")
    driver.set_page_load_timeout(PATIENCE_S)
    yield driver
    driver.quit()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_time_series_page_shows_our_charts_and_pictures(address: str, browser: Any, dark: bool) -> None:
    browser.get(f"{address}/?darkMode={str(dark).lower()}#timeseries")
    browser.execute_script(CLOSE_SETTINGS)
    wait_for(lambda: browser.execute_script(PICTURES) >= 1, "the pictures of the time-series page")
    titles = browser.execute_script("return [...document.querySelectorAll('card-view')].map(c => c.innerText)")
    for tag in ("dead_pct", "dormant_pct", "deaths_total", "worst_layer_dead_pct", "overview"):
        assert any(tag in title for title in titles), f"no card says {tag}: {titles}"
    assert not any("not_finite" in title for title in titles), "a number that is zero in most runs takes a card"
    wait_for(lambda: browser.execute_script("return document.querySelectorAll('line-chart').length") >= 4, "charts")
    assert (browser.execute_script("return document.body.classList.contains('dark-mode')")) is dark
    screenshot(browser, f"timeseries_{'dark' if dark else 'light'}.png")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_scalars_page_shows_one_group_for_a_metric(address: str, browser: Any, dark: bool) -> None:
    browser.get(f"{address}/?darkMode={str(dark).lower()}#scalars")
    wait_for(lambda: "neuronscope.dead_pct" in browser.execute_script(ALL_TEXT), "the groups of the scalars page")
    text = browser.execute_script(ALL_TEXT)
    for group in ("neuronscope", "neuronscope.dead_pct", "neuronscope.dormant_pct", "neuronscope.val_dead_pct"):
        assert group in text.split(), f"no group {group}"
    screenshot(browser, f"scalars_{'dark' if dark else 'light'}.png")


def test_the_text_page_shows_the_diagnosis_as_a_table(address: str, browser: Any) -> None:
    browser.get(f"{address}/#text")
    wait_for(lambda: "features.15/relu" in browser.execute_script(ALL_TEXT), "the diagnosis on the text page")
    text = browser.execute_script(ALL_TEXT)
    assert "neurons are dead" in text
    assert text.index("What to do") < text.index("since step"), "what to do comes before the table"
    screenshot(browser, "text_light.png")


#: Number of pictures of ours that are loaded (they are 784 pixels wide; TensorBoard's own are icons).
PICTURES = "return [...document.querySelectorAll('image-card img, img')].filter(i => i.naturalWidth === 784).length"
#: Closes the pane at the right, which hides a third of the cards.
CLOSE_SETTINGS = """
    const close = document.querySelector('button[aria-label="Close side pane"]');
    if (close) close.click();
"""
#: All text of the page, shadow roots included (the older pages are made of web components).
ALL_TEXT = """
    const text = node => [node.innerText || (node.nodeType === 3 ? node.data : ''),
        ...(node.shadowRoot ? [...node.shadowRoot.childNodes].map(text) : []),
        ...[...(node.childNodes || [])].filter(c => c.nodeType === 1).map(text)].join('\\n');
    return text(document.body);
"""


def wait_for(condition: Any, what: str) -> None:
    """Wait until a condition holds; fail with what was waited for."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.3)
    pytest.fail(f"waited {PATIENCE_S:g} s for {what}")


def fetch(url: str) -> str:
    """What an address answers; nothing while the server is not up."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read(), "utf-8")
    except OSError:
        return ""


def screenshot(browser: Any, name: str) -> None:
    """The page's picture once it is at rest, checked not to be blank, and kept where people asked for it."""
    shots = [b"", browser.get_screenshot_as_png()]

    def at_rest() -> bool:
        time.sleep(0.7)
        shots.append(browser.get_screenshot_as_png())
        return bool(shots[-1] == shots[-2] == shots[-3])

    wait_for(at_rest, "the page to come to rest")
    pixels = np.asarray(Image.open(io.BytesIO(shots[-1])).convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50, "the page is blank"
    if SCREENSHOTS:
        (Path(SCREENSHOTS) / name).write_bytes(shots[-1])
