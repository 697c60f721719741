"""Neuronscope's tab in a real browser: it opens, follows the theme, selects and compares runs, and sees new data."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neuronscope.report.report import Report
from neuronscope.writers.tensorboard import EventFile, append

from . import samples
from .test_dashboard_browser import browser, fetch, pytestmark, screenshot, served, wait_for

pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
pytest.importorskip("tensorboard.program", reason="TensorBoard is not installed")

from selenium.webdriver.support.ui import Select

__all__ = ["browser", "pytestmark"]

#: TensorBoard with our loader, whether or not the installed package names it by an entry point.
SERVE = """
import sys
from tensorboard import default, main_lib, program
from neuronscope.writers.tensorboard_plugin.loader import Loader
main_lib.global_init()
board = program.TensorBoard(plugins=[*default.get_static_plugins(), Loader])
board.configure(["tensorboard", *sys.argv[1:]])
sys.exit(board.main())
"""


def spiked(upto: int) -> Report:
    """A run with a spike of the learning rate, as its callback knows it."""
    steps = range(1, upto * 100, 20)
    series = {
        "learning_rate": tuple((step, 1e-3 * (60 if 1450 < step < 1550 else 1)) for step in steps),
        "loss": tuple((step, 2 / (1 + step / 500) + (step > 1500)) for step in steps),
    }
    return replace(samples.conv_net(upto), series=series, checkpoints=(500, 1000, 1400))


def write_into(run: Path, report: Report) -> None:
    run.mkdir(exist_ok=True)
    append(report, EventFile(str(run)), report.global_step, images=False, text=False, tab=True)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, of which one has two phases and one is still training."""
    home = tmp_path_factory.mktemp("runs")
    write_into(home / "adam", spiked(40))
    write_into(home / "adam", samples.conv_net(40, phase="val"))
    write_into(home / "sgd", samples.conv_net(20, widths=(64, 128, 256, 256, 512, 300)))
    return home


@pytest.fixture(scope="module")
def address(logs: Path) -> Iterator[str]:
    """A TensorBoard on loopback, stopped at the end whatever happens."""
    yield from served(
        logs,
        [sys.executable, "-c", SERVE],
        lambda url: '"sgd"' in fetch(f"{url}/data/plugin/neuronscope/runs"),
    )


class Tab:
    """The tab in a browser, opened anew."""

    def __init__(self, browser: Any, address: str, *, dark: bool = False) -> None:
        self.browser = browser
        browser.get("about:blank")  # else only the part after the # changes, and nothing is opened
        browser.get(f"{address}/?darkMode={str(dark).lower()}#neuronscope")
        self.wait_for_page("ConvNet", "4,000 optimizer steps")

    def ask(self, script: str) -> Any:
        """Run a script in which `tab` and `page` are the documents of the frame and of the page; None before then."""
        return self.browser.execute_script(
            "const tab = document.querySelector('iframe')?.contentDocument;"
            "const page = tab?.querySelector('iframe')?.contentDocument;"
            f"if (!page?.body) return null; {script}"
        )

    def wait_for_page(self, *texts: str) -> None:
        def shown() -> bool:
            text = self.ask("return page.readyState === 'complete' ? page.body.innerText : ''") or ""
            return all(each in text for each in texts)

        wait_for(shown, f"the page to say {texts}")

    def select(self, name: str, text: str) -> None:
        self.browser.switch_to.frame(self.browser.find_element("css selector", "iframe"))
        Select(self.browser.find_element("id", name)).select_by_visible_text(text)
        self.browser.switch_to.default_content()

    def options(self, name: str) -> list[str]:
        found: list[str] = self.ask(f"return [...tab.querySelectorAll('#{name} option')].map(o => o.textContent)")
        return found


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_tab_shows_the_page_in_tensorboards_theme(address: str, browser: Any, dark: bool) -> None:
    tab = Tab(browser, address, dark=dark)
    for place in ("tab", "page"):
        colour = tab.ask(f"return getComputedStyle({place}.body).backgroundColor")
        assert colour == ("rgb(20, 23, 27)" if dark else "rgb(247, 248, 249)")
    assert tab.ask("return page.getElementById('theme').hidden")
    wait_for(lambda: tab.ask("return page.documentElement.dataset.ready") == "true", "all layers to be unpacked")
    drawn = "const c = page.querySelector('#overview canvas'); return c.width * c.height"
    assert tab.ask(drawn) > 1000
    screenshot(browser, f"tab_{'dark' if dark else 'light'}.png")
    if not dark:
        the_page_follows_when_tensorboard_changes_its_theme(tab, browser)


def the_page_follows_when_tensorboard_changes_its_theme(tab: Tab, browser: Any) -> None:
    """In the page that is open: each page that is opened anew costs seconds."""
    before = tab.ask(PIXELS)
    browser.execute_script("document.body.classList.add('dark-mode')")
    wait_for(lambda: tab.ask("return page.documentElement.dataset.theme") == "dark", "the page to become dark")
    wait_for(lambda: tab.ask(PIXELS) != before, "the map to be drawn in the other colours")
    browser.execute_script("document.body.classList.remove('dark-mode')")
    wait_for(lambda: tab.ask(PIXELS) == before, "the map to be drawn in the first colours again")


def test_a_run_and_a_phase_are_selected(address: str, browser: Any) -> None:
    tab = Tab(browser, address)
    assert tab.options("run") == ["adam", "sgd"]
    assert tab.options("phase") == ["train", "val"]
    tab.select("phase", "val")
    tab.wait_for_page("Based on 4,096 validation examples")
    tab.select("run", "sgd")
    tab.wait_for_page("2,000 optimizer steps")
    assert tab.ask("return tab.getElementById('phase').parentElement.hidden"), "there is one phase only"


def test_two_runs_are_compared(address: str, browser: Any) -> None:
    tab = Tab(browser, address)
    assert tab.options("against") == ["nothing", "adam, val", "sgd, train"]
    tab.select("against", "sgd, train")
    tab.wait_for_page("Compared with run sgd, phase train, at step 2,000", "Not compared: 1 layer")
    heading = "const { top, bottom } = page.getElementById('h-against').getBoundingClientRect();"
    heading += "return top >= 0 && bottom <= page.defaultView.innerHeight"
    wait_for(lambda: tab.ask(heading), "the comparison to be scrolled into view")
    screenshot(browser, "tab_compared.png")
    tab.select("run", "sgd")  # it cannot be compared with itself
    tab.wait_for_page("2,000 optimizer steps")
    assert tab.options("against") == ["nothing", "adam, train", "adam, val"]
    assert "Compared with" not in tab.ask("return page.body.innerText")


def test_new_data_is_offered_and_a_reader_stays_where_he_is(address: str, browser: Any, logs: Path) -> None:
    tab = Tab(browser, address)
    tab.select("run", "sgd")
    tab.wait_for_page("2,000 optimizer steps")
    write_into(logs / "sgd", samples.conv_net(30, widths=(64, 128, 256, 256, 512, 300)))
    button = "return tab.querySelector('button').hidden ? '' : tab.querySelector('button').textContent"

    def offered() -> bool:
        browser.find_element(
            "css selector", "[aria-label='Reload data'], [data-cy='reload'], app-header-reload button"
        ).click()
        return bool(tab.ask(button) == "Show step 3,000")

    wait_for(offered, "the new step to be offered")
    assert "2,000 optimizer steps" in tab.ask("return page.body.innerText")
    tab.ask("tab.querySelector('button').click()")
    tab.wait_for_page("3,000 optimizer steps")
    assert tab.ask(button) == ""


def test_the_tab_says_what_to_do_where_no_run_has_a_report(browser: Any, address: str) -> None:
    Tab(browser, address)  # TensorBoard itself hides the tab then: the same frame is made anew, over an empty answer
    error = browser.execute_async_script(
        "const done = arguments[0], tab = document.querySelector('iframe').contentWindow;"
        "tab.fetch = async () => ({ json: async () => [] });"
        "tab.document.body.replaceChildren();"
        "const frame = new URL('data/plugin/neuronscope/frame.js', location);"
        "tab.eval(`import('${frame}').then(module => module.render())`).then(done, each => done(String(each)))"
    )
    assert error is None
    said = browser.execute_script("return document.querySelector('iframe').contentDocument.body.innerText")
    assert said.startswith("No run here has a report of Neuronscope yet.")


#: The colours of the network's map, as one number.
PIXELS = """
    const c = page.querySelector('#overview canvas');
    return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.reduce((sum, each) => sum + each, 0);
"""
