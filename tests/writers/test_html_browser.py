"""The HTML page in a real browser: maps are drawn, names are inert, keyboard and themes work."""

from __future__ import annotations

import base64
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuronscope.report.report import Report
from neuronscope.writers.formatting import visible

from . import sample_reports as samples

pytest.importorskip("selenium", reason="selenium is not installed")
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from .browser import started

pytestmark = pytest.mark.browser

PATIENCE_S = 30.0
DEAD = {"light": (213, 94, 0), "dark": (255, 122, 41)}
SILENT = {"light": (204, 121, 167), "dark": (217, 140, 184)}


def open_page(browser: Any, path: Path, theme: str = "light", width: int = 1280) -> Any:
    """Open a page of ours, in a theme and a width, with everything on it drawn."""
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.execute_cdp_cmd("Emulation.setFocusEmulationEnabled", {"enabled": True})  # a test may have tabbed out of it
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": 0, "y": 0})
    browser.get(path.as_uri())
    browser.execute_script("localStorage.clear(); delete document.documentElement.dataset.theme")
    ready = "return document.documentElement.dataset.ready === 'true' || !document.getElementById('table')"
    until(browser, lambda: bool(browser.execute_script(ready)))
    until(browser, lambda: not browser.find_elements(By.CSS_SELECTOR, ".map:not([data-drawn])"))
    return browser


def choose(browser: Any, site: int) -> Any:
    """Click a layer in the table, and return its drawing."""
    browser.execute_script("document.querySelector(arguments[0]).click()", f"#layer-{site} th a")
    until(browser, lambda: bool(browser.find_elements(By.CSS_SELECTOR, f'.map[data-layer="{site}"][data-drawn]')))
    return browser.find_element(By.CSS_SELECTOR, f'.map[data-layer="{site}"]')


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    driver = started(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Open a report, in a theme and a width, with all maps drawn; at the end nothing was said on the console."""

    def opened(report: Report, theme: str = "light", width: int = 1280) -> Any:
        report.to_html(tmp_path / "report.html")
        return open_page(browser, tmp_path / "report.html", theme, width)

    yield opened
    assert browser.get_log("browser") == []


def until(browser: Any, condition: Callable[[], bool]) -> None:
    WebDriverWait(browser, PATIENCE_S, poll_frequency=0.05).until(lambda _: condition())


def canvas_pixels(browser: Any, selector: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A canvas as it is on screen, ``(height, width, 4)``."""
    width, height, data = browser.execute_script(
        """const canvas = document.querySelector(arguments[0]);
        const bytes = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        let text = "";
        for (let at = 0; at < bytes.length; at += 4096) text += String.fromCharCode(...bytes.subarray(at, at + 4096));
        return [canvas.width, canvas.height, btoa(text)];""",  # selenium looks at each item of an array
        selector,
    )
    return np.frombuffer(base64.b64decode(data), dtype=np.uint8).reshape(height, width, 4)


def pixels(browser: Any, site: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The map of a site as it is on screen, ``(height, width, 4)``."""
    choose(browser, site)
    return canvas_pixels(browser, f'.map[data-layer="{site}"] canvas')


def is_colour(image: np.ndarray[Any, np.dtype[np.uint8]], colour: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    same: np.ndarray[Any, Any] = (image[..., :3] == colour).all(axis=-1)
    return same


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_maps_are_drawn_with_the_dead_in_their_own_colour(show: Callable[..., Any], theme: str) -> None:
    report = samples.mixed()
    browser = show(report, theme)
    for index, site in enumerate(report.layers):
        if site.name == "never.ran/relu":
            continue
        image = pixels(browser, index)
        assert (image[..., 3] == 255).all()
        assert len(np.unique(image.view(np.uint32))) > 10  # colours
        # Sites of at most 45 neurons have whole rows of 4 pixels; the others share 180 rows: each dead one still shows.
        last = is_colour(image, DEAD[theme])[:, -1].sum() / image.shape[0] * site.neurons
        assert last == pytest.approx(site.dead, abs=1.0 + 0.02 * site.neurons)
        assert (last > 0) == (site.dead > 0)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_silent_neurons_have_a_colour_of_their_own_and_are_named_when_pointed_at(
    show: Callable[..., Any], theme: str
) -> None:
    silent = samples.site("relu", 20, samples.Fate(silent=5), windows=4)  # silent from the second window on
    browser = show(samples.report(silent, samples.site("other", 20, windows=4)), theme)
    image = pixels(browser, 0)
    assert is_colour(image, SILENT[theme])[:, -1].mean() == pytest.approx(5 / 20, abs=0.08)
    assert is_colour(image, SILENT[theme])[:, 0].sum() == 0
    assert is_colour(pixels(browser, 1), SILENT[theme]).sum() == 0
    browser.execute_script("arguments[0].focus()", choose(browser, 0))
    until(browser, lambda: "silent" in said(browser, 0))
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    until(browser, lambda: ": silent · " in said(browser, 0) and said(browser, 0).endswith(": silent"))


def test_the_axis_of_steps_shows_each_window_at_its_step(show: Callable[..., Any]) -> None:
    """Windows that end at steps 10, 20 and 100: the dead third column takes 80 of 100 parts of the width."""
    plain = samples.site("relu", 8, samples.Fate(died=8), windows=3)
    levels = plain.history.levels.copy()
    levels[:2], levels[2] = 100, 255
    history = replace(plain.history, steps=np.array([10, 20, 100]), levels=levels)
    browser = show(samples.report(replace(plain, history=history)))
    image = pixels(browser, 0)
    assert is_colour(image, DEAD["light"])[1].mean() == pytest.approx(0.8, abs=0.01)


def test_one_dead_neuron_in_thousands_is_visible(show: Callable[..., Any]) -> None:
    alive = samples.site("relu", 4096, windows=8)
    one = samples.site("relu", 4096, samples.Fate(died=1), windows=8)
    browser = show(samples.report(alive, one))

    def orange(site: int) -> int:
        image = pixels(browser, site).astype(int)
        return int((image[..., 0] - image[..., 2] > 60).any(axis=1).sum())

    assert orange(0) == 0
    assert orange(1) == 1


def test_hostile_names_do_not_run_in_the_browser(show: Callable[..., Any]) -> None:
    report = samples.hostile()
    browser = show(report)  # an alert would make every later command fail
    assert len(browser.find_elements(By.CSS_SELECTOR, "main script, main img, main a[href^='http']")) == 0
    map_ = choose(browser, 0)
    assert samples.HOSTILE in map_.get_attribute("aria-label")
    assert browser.find_element(By.CSS_SELECTOR, "article h3").get_attribute("textContent") == samples.HOSTILE
    assert browser.title.count(samples.HOSTILE) == 2
    names = browser.find_elements(By.CSS_SELECTOR, "#overview-names span")
    assert [name.get_attribute("textContent") for name in names] == [visible(site.name) for site in report.layers]


def test_the_browser_fetches_nothing_from_elsewhere(show: Callable[..., Any]) -> None:
    browser = show(samples.mixed())
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def column(browser: Any, number: int) -> list[str]:
    texts: list[str] = browser.execute_script(
        "const rows = [...document.querySelectorAll('#table tbody tr')];"
        "return rows.map(row => row.cells[arguments[0]].textContent.trim())",
        number,
    )
    return texts


@pytest.mark.parametrize("key", [Keys.ENTER, Keys.SPACE])
def test_the_table_is_sorted_by_keyboard(show: Callable[..., Any], key: str) -> None:
    browser = show(samples.mixed())
    headings = browser.find_elements(By.CSS_SELECTOR, "#table thead th")
    names = [heading.text.strip() for heading in headings]
    at = names.index("Dead")
    button = headings[at].find_element(By.TAG_NAME, "button")
    browser.execute_script("arguments[0].focus()", headings[at - 1].find_element(By.TAG_NAME, "button"))
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    assert browser.switch_to.active_element == button
    ActionChains(browser).send_keys(key).perform()
    # Not measured stays last, whichever way: it is no number.
    assert column(browser, at) == ["24", "12", "3", "1", "·", "·", "·", "unseen"]
    assert headings[at].get_attribute("aria-sort") == "descending"
    ActionChains(browser).send_keys(key).perform()
    assert column(browser, at) == ["·", "·", "·", "1", "3", "12", "24", "unseen"]
    assert headings[at].get_attribute("aria-sort") == "ascending"
    assert browser.find_element(By.ID, "said").get_attribute("textContent") == "Sorted by Dead, ascending."
    assert len(browser.find_elements(By.CSS_SELECTOR, "th[aria-sort]")) == 1
    headings[0].find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert column(browser, 0) == [str(number) for number in range(1, 9)]


def said(browser: Any, site: int) -> str:
    text: str = browser.find_element(By.ID, f"at-{site}").text
    return text


def test_a_map_is_read_by_keyboard(show: Callable[..., Any]) -> None:
    report = samples.mixed()
    site = report["features.3/relu"]
    browser = show(report)
    browser.execute_script("arguments[0].focus()", choose(browser, 1))
    until(browser, lambda: said(browser, 1) != "")
    died = site.history.died_step
    first, second = sorted(np.flatnonzero(site.judgement.dead), key=lambda neuron: (died[neuron], neuron))[:2]
    whole = "zero at 100 % of positions"
    assert said(browser, 1) == f"Neuron {first}: dead · {whole} · died at step {died[first]:,} · at step 2,000: dead"
    ActionChains(browser).send_keys(Keys.ARROW_DOWN).perform()
    until(browser, lambda: said(browser, 1).startswith(f"Neuron {second}: dead"))
    ActionChains(browser).send_keys(Keys.HOME).perform()
    until(browser, lambda: "at step 100: zero at" in said(browser, 1))
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    until(browser, lambda: "at step 200: " in said(browser, 1))
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    until(browser, lambda: said(browser, 1) == "")


def test_pointing_at_a_map_shows_the_neuron_under_the_pointer(show: Callable[..., Any]) -> None:
    report = samples.mixed()
    browser = show(report)
    box = choose(browser, 0)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
    size = box.size
    # One pixel below the upper edge, at the right: the first neuron of 64 on 180 pixels. Born dead, lowest index first.
    ActionChains(browser).move_to_element_with_offset(box, size["width"] // 2 - 5, -(size["height"] // 2) + 1).perform()
    site = report["features.0/relu"]
    first = int(np.flatnonzero(site.judgement.dead & (site.last_active_step < 0))[0])
    until(browser, lambda: said(browser, 0).startswith(f"Neuron {first}: dead"))
    assert "no death seen: dead from the start" in said(browser, 0)


def test_a_layers_weights_and_revivals_stand_in_its_details_as_text(show: Callable[..., Any]) -> None:
    browser = show(samples.acted())

    def facts() -> list[str]:
        return [each.text for each in browser.find_elements(By.CSS_SELECTOR, ".layer .fact")]

    choose(browser, 0)
    until(browser, lambda: len(facts()) == 2)
    assert facts()[0] == "Weights: rows of layers fc1, norm lead in, columns of layer fc2 read it."
    assert facts()[1] == f"Revived: 5 neurons at 2 steps, last at step 1,200 by {samples.HOSTILE}: 1–3, 7."
    choose(browser, 1)
    until(browser, lambda: len(facts()) == 1)
    assert facts()[0].startswith(f"Weights: rows of layer {samples.HOSTILE}; not known exactly: added in")
    choose(browser, 2)
    until(browser, lambda: not facts())


@pytest.mark.slow
def test_a_row_for_several_neurons_shows_its_share_of_dead_ones(show: Callable[..., Any]) -> None:
    report = samples.noisy(sites=2, neurons=65_536, windows=70)
    browser = show(report)
    browser.execute_script("arguments[0].focus()", choose(browser, 0))
    until(browser, lambda: "neurons of this row dead" in said(browser, 0))
    assert "neurons share a row" in browser.find_element(By.CSS_SELECTOR, ".kept").text


def test_the_theme_is_switched_and_remembered(show: Callable[..., Any]) -> None:
    browser = show(samples.mixed(), "light")
    button = browser.find_element(By.ID, "theme")
    browser.execute_script("arguments[0].focus()", button)
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert button.text == "Light"
    image = pixels(browser, 0)
    assert is_colour(image, DEAD["dark"]).any()
    assert not is_colour(image, DEAD["light"]).any()
    browser.refresh()
    assert browser.execute_script("return document.documentElement.dataset.theme") == "dark"
    browser.execute_script("localStorage.clear()")


CONTRAST = """
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const background = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = parse(getComputedStyle(at).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const poor = [];
let looked = 0;
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  if (!own || ["SCRIPT", "NOSCRIPT"].includes(element.tagName) || !element.getClientRects().length) continue;
  looked += 1;
  const [a, b] = [parse(getComputedStyle(element).color), background(element)].map(luminance);
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) poor.push(`${element.tagName}.${element.className} ${element.textContent} ${ratio.toFixed(2)}`);
}
return [looked, poor];
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("sample", [samples.mixed, samples.broken])
def test_text_has_the_contrast_of_wcag_aa(show: Callable[..., Any], sample: Callable[[], Report], theme: str) -> None:
    looked, poor = show(sample(), theme).execute_script(CONTRAST)
    assert looked > 60
    assert poor == []


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_never_scrolls_sideways(show: Callable[..., Any], width: int) -> None:
    browser = show(samples.hostile(), width=width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_healthy_sites_can_be_hidden(show: Callable[..., Any]) -> None:
    browser = show(samples.many(12))
    shown = "return [...document.querySelectorAll('#table tbody tr')].filter(row => row.offsetParent).length"
    assert browser.execute_script(shown) == 12
    browser.find_element(By.ID, "only").click()
    assert browser.execute_script(shown) == 1


def tabbed(browser: Any, most: int = 60) -> list[str]:
    """What the focus stops at, from the top of the page to its end."""
    browser.execute_script("document.activeElement.blur(); getSelection().removeAllRanges(); scrollTo(0, 0)")
    stops: list[str] = []
    name = """const at = document.activeElement;
        return at === document.body ? "" : `${at.tagName} ${at.id || at.className || at.textContent.trim()}`"""
    for _ in range(most):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        at = browser.execute_script(name)
        if not at:
            break
        stops.append(at)
    return stops


def test_the_keyboard_has_few_stops_however_many_layers_there_are(show: Callable[..., Any]) -> None:
    browser = show(samples.many(120))
    stops = tabbed(browser)
    assert len(stops) < 20, stops
    assert "DIV overview" in stops
    assert "INPUT find" in stops
    assert sum(stop.startswith("A ") for stop in stops) == 2  # the skip link, and one for all layers
    first = browser.find_element(By.CSS_SELECTOR, "#table tbody th a")
    browser.execute_script("arguments[0].focus()", first)
    ActionChains(browser).send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN).perform()
    assert browser.execute_script("return document.activeElement.closest('tr').id") == "layer-2"
    ActionChains(browser).send_keys(Keys.END).perform()
    assert browser.execute_script("return document.activeElement.closest('tr').id") == "layer-119"
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    until(browser, lambda: browser.execute_script("return document.activeElement.dataset.layer") == "119")


def test_the_map_of_the_network_is_in_the_first_screen_and_opens_a_layer(show: Callable[..., Any]) -> None:
    fate = samples.Fate(died=6)
    report = samples.report(*(samples.site(f"net.{i}", 8, fate if i == 2 else None, windows=4) for i in range(4)))
    browser = show(report)
    box = browser.find_element(By.ID, "overview")
    assert browser.execute_script("return arguments[0].getBoundingClientRect().bottom", box) < 900
    assert browser.find_element(By.CSS_SELECTOR, "#chosen h3").text == "net.2"  # the worst
    image = canvas_pixels(browser, "#overview canvas")
    height = image.shape[0] // 4
    orange = [
        (image[row * height + height // 2, -1, :3].astype(int) * (1, 0, -1)).sum() for row in range(4)
    ]  # red above blue
    assert orange[2] > 100
    assert max(orange[0], orange[1], orange[3]) < 10
    browser.execute_script("arguments[0].focus()", box)
    text = "return document.getElementById('at-overview').textContent"
    until(browser, lambda: "net.2 at step 400: 6 of 8 dead (75 %), the rest " in browser.execute_script(text))
    ActionChains(browser).send_keys(Keys.ARROW_DOWN, Keys.HOME).perform()
    until(browser, lambda: "net.3 at step 100: 0 of 8 dead (0 %)" in browser.execute_script(text))
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    until(browser, lambda: browser.find_element(By.CSS_SELECTOR, "#chosen h3").text == "net.3")


@pytest.mark.slow
def test_the_map_of_a_large_network_is_in_the_first_screen(show: Callable[..., Any]) -> None:
    fate = samples.Fate(born=3, died=20, dormant=4)
    browser = show(samples.report(*(samples.site(f"blocks.{i}.fc1/relu", 64, fate, seed=i) for i in range(300))))
    box = browser.find_element(By.ID, "overview")
    assert browser.execute_script("return arguments[0].getBoundingClientRect().bottom", box) < 900
    assert browser.execute_script("return document.querySelectorAll('canvas').length") == 2


def test_layers_are_found_by_their_name(show: Callable[..., Any]) -> None:
    browser = show(samples.many(120))
    shown = "return [...document.querySelectorAll('#table tbody tr')].filter(row => !row.hidden).map(row => row.id)"
    browser.find_element(By.ID, "find").send_keys("LAYERS.11")
    assert browser.execute_script(shown) == [f"layer-{at}" for at in (11, *range(110, 120))]
    assert browser.find_element(By.ID, "said").get_attribute("textContent") == "11 of 120 layers are shown."
    browser.find_element(By.ID, "only").click()
    assert browser.execute_script(shown) == []
    browser.find_element(By.ID, "find").clear()
    browser.find_element(By.ID, "find").send_keys("0")
    assert browser.execute_script(shown) == ["layer-50"]


def test_the_heading_of_the_table_stays_in_sight(show: Callable[..., Any]) -> None:
    browser = show(samples.many(120))
    tops = """const box = document.querySelector('.scroll.tall');
        box.scrollTop = box.scrollHeight;
        return [box, box.querySelector('thead th')].map(each => each.getBoundingClientRect().top)"""
    box, heading = browser.execute_script(tops)
    assert abs(heading - box) < 3


COPIED = """window.copied = [];
navigator.clipboard.writeText = arguments[0] ? async (text) => { copied.push(text); } : () => Promise.reject();
document.addEventListener("copy", () => copied.push(document.activeElement.value));"""


@pytest.mark.parametrize("has_clipboard", [True, False])
def test_indices_are_copied_with_a_click(show: Callable[..., Any], has_clipboard: bool) -> None:
    report = samples.mixed()
    browser = show(report)
    choose(browser, 1)
    browser.execute_script(COPIED, has_clipboard)
    buttons = "return [...document.querySelectorAll('.indices button')].map(button => button.textContent)"
    until(browser, lambda: browser.execute_script(buttons) == ["Copy 24 dead", "Copy 3 silent", "Copy 6 dormant"])
    button = browser.find_element(By.CSS_SELECTOR, ".indices button")
    button.click()
    dead = np.flatnonzero(report["features.3/relu"].judgement.dead)
    until(browser, lambda: browser.execute_script("return copied") == [", ".join(map(str, dead))])
    until(browser, lambda: button.text == "Copied 24")


def test_a_click_shows_the_life_of_one_neuron(show: Callable[..., Any]) -> None:
    report = samples.mixed()
    site = report["features.3/relu"]
    browser = show(report)
    browser.execute_script("arguments[0].focus()", choose(browser, 1))
    until(browser, lambda: said(browser, 1).startswith("Neuron"))
    ActionChains(browser).send_keys(Keys.HOME, Keys.ENTER).perform()
    died = site.history.died_step
    neuron = min(np.flatnonzero(site.judgement.dead), key=lambda each: (died[each], each))
    life = browser.find_element(By.CSS_SELECTOR, "#chosen .life")
    assert life.text.startswith(f"Neuron {neuron}: dead")
    assert f"died at step {died[neuron]:,}" in life.text
    path = life.find_element(By.CSS_SELECTOR, "path.dead").get_attribute("d")
    windows = int((site.history.levels[:, neuron] == 255).sum())
    assert path.count("M") == windows
    assert life.find_element(By.CSS_SELECTOR, "path.rest").get_attribute("d").count("M") == 20 - windows
    assert life.find_element(By.TAG_NAME, "button").text == f"Copy index {neuron}"


def test_two_steps_are_compared(show: Callable[..., Any]) -> None:
    report = samples.mixed()
    browser = show(report)
    browser.execute_script("document.getElementById('compare').open = true")
    for which, step in (("to", 300), ("from", 900)):  # in either order
        browser.execute_script(
            """const select = document.getElementById(arguments[0]);
            select.value = [...select.options].find(option => option.textContent === arguments[1]).value;
            select.dispatchEvent(new Event("change"));""",
            which,
            f"{step:,}",
        )
    expected = {}
    for site in report.layers:
        died, back = ((at > 300) & (at <= 900) for at in (site.history.died_step, site.history.revived_step))
        if died.any() or back.any():
            dead = [str(site.history.dead[site.history.steps == step][0]) for step in (300, 900)]
            expected[site.name] = [*dead, int(died.sum()), int(back.sum())]
    assert len(expected) >= 2
    total = [sum(row[at] for row in expected.values()) for at in (2, 3)]
    sentence = f"Between steps 300 and 900, {total[0]} died and {total[1]} revived, in {len(expected)} layers."
    until(browser, lambda: sentence in browser.find_element(By.ID, "between").text)
    rows = browser.execute_script(
        "return [...document.querySelectorAll('#between tbody tr')].map(row => [...row.cells].map(c => c.textContent))"
    )
    numbers = {row[0]: [*row[1:3], *(int(text.split()[1]) if text != "·" else 0 for text in row[3:])] for row in rows}
    assert numbers == expected


def test_everything_is_drawn_for_printing_whatever_was_looked_at(show: Callable[..., Any]) -> None:
    report = samples.mixed()
    browser = show(report, "dark")
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    for index, site in enumerate(report.layers):
        if site.name != "never.ran/relu":
            image = canvas_pixels(browser, f'#printed .map[data-layer="{index}"] canvas')
            assert (image[..., 3] == 255).all()
            assert is_colour(image, DEAD["light"]).any() == (site.dead > 0)  # on paper, whatever the theme
    assert browser.execute_script("return document.querySelectorAll('details:not([open])').length") == 0
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert browser.execute_script("return document.querySelectorAll('#printed canvas').length") == 0
    assert browser.execute_script("return document.documentElement.dataset.theme") is None
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    colours = [set(re.findall(b"...", zlib.decompress(data), re.DOTALL)) for data in images(pdf)]
    assert len(colours) >= 8
    assert sum(bytes(DEAD["light"]) in found for found in colours) == 4  # layers with dead neurons


def images(pdf: bytes) -> list[bytes]:
    """The deflated pixels of the images in a PDF."""
    found = re.findall(rb"/Subtype /Image.*?/Length (\d+).*?stream\r?\n", pdf, re.DOTALL)
    starts = [match.end() for match in re.finditer(rb"/Subtype /Image.*?stream\r?\n", pdf, re.DOTALL)]
    return [pdf[start : start + int(length)] for start, length in zip(starts, found, strict=True)]


@pytest.mark.parametrize("sample", [samples.mixed, samples.broken, samples.unwatched, samples.hostile])
def test_axe_finds_nothing(show: Callable[..., Any], sample: Callable[[], Report]) -> None:
    browser = show(sample())
    browser.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    assert axe(browser) == []


def axe(browser: Any) -> list[str]:
    """What axe-core finds wrong with a page that is open: rule, element and reason."""
    home = pytest.importorskip("axe_core_python", reason="axe-core-python is not installed").__path__[0]
    browser.execute_script((Path(home) / "axe.min.js").read_text(encoding="utf-8"))
    run = "const done = arguments[0]; axe.run().then((found) => done(found.violations))"
    violations = browser.execute_async_script(run)
    return [
        f"{each['id']}: {node['html'][:90]}: {node['failureSummary']}" for each in violations for node in each["nodes"]
    ]
