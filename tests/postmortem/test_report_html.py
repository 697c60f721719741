"""A post-mortem as an HTML page: within its size, self-contained, closed to names, and right in a real browser."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuronscope.checkpoints.postmortem_report import PostmortemReport
from neuronscope.checkpoints.verdict.evidence import BASES
from neuronscope.checkpoints.verdict.layer_verdicts import DEAD_CLAIMS, FIRM, LABELS
from neuronscope.checkpoints.writers.neuron_map import IDLE, LADDER, network_map, pack, worst_first
from tests.writers.html_page import Page

from . import samples


@pytest.mark.parametrize("noise", [False, True])
def test_a_page_for_twelve_layers_of_4096_neurons_stays_below_300_kb(noise: bool) -> None:
    text = samples.wide(noise=noise).to_html()
    assert len(text.encode("utf-8")) < 300_000
    assert ("To keep this page small" in text) == noise


@pytest.mark.slow
def test_a_page_for_eighty_layers_of_28672_neurons_stays_below_a_megabyte() -> None:
    assert len(samples.wide(80, 28_672).to_html().encode("utf-8")) < 1_000_000


def test_of_very_many_layers_the_page_draws_the_worst_and_says_how_to_see_the_rest() -> None:
    said = [samples.evidence(f"l{at}", 9, "dead", "proved", [0, 1] if at % 50 == 0 else [0]) for at in range(5_000)]
    said.append(samples.evidence("broken", 9, "not finite", "inferred", [3]))
    said.append(samples.evidence("calm", 9, "alive", "inferred", [3]))
    text = samples.report(said).to_html()
    assert len(text) < 1_000_000
    page = Page(text)
    shown = [row[1][0] for row in page.rows[1:] if len(row) > 6]
    assert len(shown) == 400 == len(page.data["layers"])
    assert {"broken", *(f"l{at}" for at in range(0, 5_000, 50))} <= set(shown)
    words = " ".join(" ".join(page.words).split())
    assert "4,601 more layers with no more dead than these" in words
    assert "1 more layer with nothing to report" in words
    assert "All layers are in the JSON report" in words


def test_the_page_loads_nothing_from_elsewhere() -> None:
    Page(samples.hostile().to_html()).assert_loads_nothing_from_elsewhere()


def test_the_security_policy_allows_only_our_own_script_and_style() -> None:
    Page(samples.hostile().to_html()).assert_policy_allows_only_its_own_script_and_style()


def test_hostile_names_are_escaped_to_plain_text() -> None:
    page = Page(samples.hostile().to_html())
    words = "".join(page.words)
    assert words.count(samples.HOSTILE) > 12
    assert "\\x1b[31mred\\n| x |" in words
    assert "\u202e" not in words
    assert sum(tag == "script" for tag, _ in page.elements) == 2


@pytest.mark.parametrize(
    ("layer", "heading", "shown", "key"),
    [
        ("net.0", "Dead", "16", None),
        ("net.0", "Dead %", "25 %", "25.0"),
        ("net.0", "How sure", "16 measured", None),
        ("net.4", "How sure", "6 proved, 6 measured", None),
        ("net.4", "Contested", "4", None),
        ("net.6", "Dead", "·", None),
        ("net.6", "Other", "3 quiet", None),
        ("net.6", "Since", "·", ""),
    ],
)
def test_table_cells_show_their_values_and_sort_by_them(layer: str, heading: str, shown: str, key: str | None) -> None:
    rows = Page(samples.with_data().to_html()).rows
    column = [text for text, _ in rows[0]].index(heading)
    assert next(row for row in rows[1:] if row[1][0] == layer)[column] == (shown, key)


def cards(report: PostmortemReport) -> dict[str, str]:
    return dict(re.findall(r"<dt>([^<]*)</dt><dd><strong>([^<]*)</strong>", report.to_html()))


def test_the_headline_shows_the_numbers_of_the_report() -> None:
    assert cards(samples.with_model()) == {
        "Dead": "43",
        "Dead share": "12 %",
        "Since step": "4,110",
        "How sure": "6 proved",
        "Suspected": "0",
        "Unknown": "0",
    }
    assert cards(samples.broken())["Dead share"] == "–"
    assert cards(samples.empty()) == {}


def unpacked(layer: Any, budget: int) -> tuple[Any, np.ndarray[Any, np.dtype[np.uint8]]]:
    field = pack(layer, budget)
    return field, np.frombuffer(zlib.decompress(base64.b64decode(field.data)), dtype=np.uint8)


@pytest.mark.parametrize("sample", [samples.with_data, samples.hostile, samples.idle])
def test_a_neuron_map_shows_every_neuron(sample: Callable[[], PostmortemReport]) -> None:
    for layer in sample().layers:
        field, raw = unpacked(layer, 1 << 30)
        size, told = layer.neurons, field.marked
        index = raw[: 4 * size].reshape(4, size).T.copy().view("<u4")[:, 0]
        mask = raw[4 * size : 8 * size].reshape(4, size).T.copy().view("<u4")[:, 0]
        deciding, dating, marks = raw[8 * size : 11 * size].reshape(3, size)
        since = raw[11 * size : 11 * size + 4 * told].reshape(4, told).T.copy().view("<u4")[:, 0]
        numbers = raw[11 * size + 4 * told :].reshape(4, told).T.copy().view("<f4")[:, 0]
        assert sorted(index.tolist()) == list(range(size))
        labels = [(label, basis) for label, basis, count in field.runs for _ in range(count)]
        for place, neuron in enumerate(index.tolist()):
            verdict = layer.verdict(neuron)
            label, basis = labels[place]
            assert (label == IDLE) == layer.idle[neuron]
            if label != IDLE:
                assert LABELS[label] == verdict.label
            assert (BASES[basis] if basis < len(BASES) else "") == verdict.basis
            assert deciding[place] == layer.deciding[neuron] + 1
            assert dating[place] == layer.dating[neuron] + 1
            woken = layer.woken is not None and layer.woken[neuron] >= 0
            assert marks[place] == layer.contested[neuron] + 2 * woken
            assert mask[place] == sum(1 << at for at, one in enumerate(layer.evidence) if neuron in one.neurons)
            if place < told:
                assert int(since[place]) - 2 == layer.since[neuron]
                assert numbers[place] == np.float32(layer.numbers[neuron]) or np.isnan(layer.numbers[neuron])
            else:
                assert verdict.label in ("alive", "unknown")
                assert not marks[place] & 1


def dead_by(report: PostmortemReport, index: int, step: int) -> int:
    """How many neurons of a layer had died by a step, from their verdicts; at the checkpoint, all that are dead."""
    layer, found = report.layers[index], 0
    for neuron in range(layer.neurons):
        one = layer.verdict(neuron)
        if one.label in DEAD_CLAIMS and one.basis in FIRM and not layer.idle[neuron]:
            found += step == report.global_step or (one.since is not None and one.since <= step)
    return found


@pytest.mark.parametrize("sample", [samples.with_data, samples.several, samples.hostile, samples.idle, samples.broken])
def test_the_map_of_the_network_counts_who_had_died_by_each_step(sample: Callable[[], PostmortemReport]) -> None:
    report = sample()
    found = network_map(report.layers, report.global_step or 0, 40_000)
    assert found is not None
    assert found.steps[-1] == report.global_step
    layers, columns = len(report.layers), len(found.steps)
    data = zlib.decompress(base64.b64decode(found.data))
    sizes, dead = (
        np.frombuffer(data, np.uint8, 4 * count, at).reshape(4, count).T.copy().view("<u4").ravel()
        for count, at in ((layers, 0), (layers * columns, 4 * layers))
    )
    assert sizes.tolist() == [layer.neurons for layer in report.layers]
    expected = [[dead_by(report, index, step) for step in found.steps] for index in range(layers)]
    assert dead.reshape(layers, columns).tolist() == expected
    assert len(json.loads(data[4 * layers + 5 * layers * columns :])) == layers


def test_detail_is_dropped_in_stages_and_labels_are_never_dropped() -> None:
    layer = samples.wide(1, 4096, noise=True).layers[0]
    runs = pack(layer, 1 << 30).runs
    seen = []
    for budget in (1 << 30, 15_000, 11_000, 10_000, 0):
        field = pack(layer, budget)
        assert field.runs == runs
        assert len(field.data) <= budget
        seen.append(field.detail)
    assert [LADDER.index(detail) for detail in seen] == [0, 1, 2, 3, 4]


def test_the_worst_layers_and_neurons_come_first() -> None:
    layer = samples.with_data()["net.4"]
    labels = [(LABELS[layer.labels[n]], BASES[layer.basis[n]]) for n in worst_first(layer)]
    assert labels[:6] == [("dead", "proved")] * 6
    assert labels[6:12] == [("dead", "measured")] * 6
    assert layer.contested[worst_first(layer)[12:16]].all()  # alive, and yet there is more to say


def test_the_timeline_counts_every_dated_death() -> None:
    text = samples.alone().to_html()
    # Bins of 5001 / 120 = 41.7 steps; all died at 4,097 to 4,119, in bin 98.
    assert "41 in all, at most 41 within about 42 steps" in text
    drawn = re.findall(r'<svg viewBox="0 0 120 100"[^>]*><path d="([^"]*)"', text)
    assert [re.findall(r"M(\d+)", path) for path in drawn] == [["98"]] * 3
    assert 'id="h-when"' not in samples.healthy().to_html()


# --- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("selenium", reason="selenium is not installed")
    from tests.writers.browser import started

    driver = started(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Open a post-mortem, in a theme and a width, with all fields drawn; at the end nothing was said on the console."""
    from tests.writers.test_html_browser import open_page

    def opened(report: PostmortemReport, theme: str = "light", width: int = 1280) -> Any:
        report.to_html(tmp_path / "report.html")
        return open_page(browser, tmp_path / "report.html", theme, width)

    yield opened
    assert browser.get_log("browser") == []


def pixels(browser: Any, layer: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    from tests.writers.test_html_browser import canvas_pixels, choose

    choose(browser, layer)
    return canvas_pixels(browser, f'.map[data-layer="{layer}"] canvas')


COLOURS = {
    "light": {"proved": (143, 63, 0), "measured": (213, 94, 0), "inferred": (232, 145, 90)},
    "dark": {"proved": (255, 185, 143), "measured": (255, 122, 41), "inferred": (179, 90, 38)},
}


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_each_neuron_has_a_cell_in_the_colour_of_its_evidence(show: Callable[..., Any], theme: str) -> None:
    report = samples.with_data()
    browser = show(report, theme)
    for index, layer in enumerate(report.layers):
        image = pixels(browser, index)
        # Cells are 16 pixels, of which one is a gap: 15 × 15 of colour each; none of the dead is contested here.
        for basis, number in layer.dead_by_basis().items():
            same = (image[..., :3] == COLOURS[theme][basis]).all(axis=-1).sum()
            assert same == 225 * number, (layer.name, basis)


@pytest.mark.browser
def test_one_dead_neuron_in_tens_of_thousands_is_visible(show: Callable[..., Any]) -> None:
    browser = show(samples.report(samples.adam("a", 65_536, [40_000], [4000], 5000)))
    assert (pixels(browser, 0)[..., :3] == COLOURS["light"]["inferred"]).all(axis=-1).any()


@pytest.mark.browser
def test_the_map_of_the_network_is_read_by_keyboard_and_chooses_a_layer(show: Callable[..., Any]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    from tests.writers.test_html_browser import until

    browser = show(samples.with_data())
    until(browser, lambda: browser.execute_script("return document.querySelector('#overview[data-drawn]') !== null"))
    said = "return document.querySelector('#at-overview').textContent"
    browser.execute_script("document.querySelector('#overview').focus()")
    until(browser, lambda: browser.execute_script(said).startswith("net.0 at step 5,000: 16 of 64 dead (25 %)"))
    assert browser.execute_script(said).endswith("the rest alive")
    ActionChains(browser).send_keys(Keys.HOME).perform()
    until(browser, lambda: "net.0 at step 0" in browser.execute_script(said))
    ActionChains(browser).send_keys(Keys.ARROW_DOWN, Keys.ENTER).perform()
    until(browser, lambda: browser.execute_script("return document.querySelector('#chosen h3').textContent") == "net.2")


@pytest.mark.browser
def test_a_neuron_map_is_read_by_keyboard(show: Callable[..., Any]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    from tests.writers.test_html_browser import choose, said, until

    report = samples.with_data()
    browser = show(report)
    layer = report["net.4"]
    order = worst_first(layer)
    browser.execute_script("arguments[0].focus()", choose(browser, 2))
    until(browser, lambda: said(browser, 2) != "")
    first = layer.verdict(int(order[0]))
    text = said(browser, 2)
    assert text.startswith(
        f"Neuron {first.neuron}: dead, proved (layer norm) · largest pre-activation of any input: {first.number}"
    )
    assert f"since step {first.since:,} (adam state, inferred)" in text
    assert "also: no gradient, inferred (adam state); dead, measured (scan)" in text
    for _ in range(12):
        ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    until(browser, lambda: said(browser, 2).startswith(f"Neuron {order[12]}: alive, measured (scan)"))
    assert said(browser, 2).endswith("CONTESTED")
    ActionChains(browser).send_keys(Keys.END).perform()
    until(browser, lambda: said(browser, 2).startswith(f"Neuron {order[-1]}: alive"))
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    until(browser, lambda: said(browser, 2) == "")


@pytest.mark.browser
def test_pointing_at_a_cell_shows_its_neuron(show: Callable[..., Any]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    from tests.writers.test_html_browser import choose, said, until

    report = samples.with_data()
    browser = show(report)
    box = choose(browser, 0)
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", box)
    size = box.size
    offset = 3 * 16 + 8 - size["width"] // 2  # the middle of the fourth cell of 16 pixels
    ActionChains(browser).move_to_element_with_offset(box, offset, 8 - size["height"] // 2).perform()
    fourth = int(worst_first(report.layers[0])[3])
    until(browser, lambda: said(browser, 0).startswith(f"Neuron {fourth}: dead, measured"))


@pytest.mark.browser
def test_the_table_is_sorted_by_keyboard(show: Callable[..., Any]) -> None:
    from selenium.webdriver.common.keys import Keys

    browser = show(samples.with_data())
    headings = browser.find_elements("css selector", "#table thead th")
    at = [heading.text.strip() for heading in headings].index("Since")
    headings[at].find_element("css selector", "button").send_keys(Keys.ENTER)
    rows = "return [...document.querySelectorAll('#table tbody th')].map(cell => cell.textContent)"
    # Middle steps 4,110, 4,110 and 4,109; net.6 has none and stays last, whichever way.
    assert browser.execute_script(rows)[-2:] == ["net.4", "net.6"]
    headings[at].find_element("css selector", "button").send_keys(Keys.ENTER)
    assert browser.execute_script(rows)[0::3] == ["net.4", "net.6"]


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("sample", [samples.with_data, samples.broken, samples.alone, samples.several])
def test_text_has_the_contrast_of_wcag_aa(
    show: Callable[..., Any], sample: Callable[[], PostmortemReport], theme: str
) -> None:
    from tests.writers.test_html_browser import CONTRAST

    looked, poor = show(sample(), theme).execute_script(CONTRAST)
    assert looked > 60
    assert poor == []


@pytest.mark.browser
@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("sample", [samples.hostile, samples.with_data, samples.several])
def test_the_page_never_scrolls_sideways(
    show: Callable[..., Any], sample: Callable[[], PostmortemReport], width: int
) -> None:
    assert show(sample(), width=width).execute_script("return document.documentElement.scrollWidth") <= width


@pytest.mark.browser
def test_hostile_names_do_not_run_and_nothing_is_fetched(show: Callable[..., Any]) -> None:
    browser = show(samples.hostile())  # an alert would make every later command fail
    assert len(browser.find_elements("css selector", "main script, main img, main a[href^='http']")) == 0
    from tests.writers.test_html_browser import choose

    choose(browser, 0)
    assert browser.find_elements("css selector", "article.layer h3")[0].get_attribute("textContent") == samples.HOSTILE
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


@pytest.mark.browser
@pytest.mark.parametrize("sample", [samples.with_data, samples.broken, samples.several, samples.hostile])
def test_axe_finds_nothing(show: Callable[..., Any], sample: Callable[[], PostmortemReport]) -> None:
    from tests.writers.test_html_browser import axe

    browser = show(sample())
    browser.execute_script("for (const each of document.querySelectorAll('details')) each.open = true")
    assert axe(browser) == []


@pytest.mark.browser
def test_the_indices_of_each_label_are_copied_with_a_click(show: Callable[..., Any]) -> None:
    from tests.writers.test_html_browser import COPIED, choose, until

    report = samples.with_data()
    browser = show(report)
    choose(browser, 2)
    browser.execute_script(COPIED, True)
    button = ".indices button"
    until(browser, lambda: len(browser.find_elements("css selector", button)) > 0)
    browser.find_element("css selector", button).click()
    dead = np.flatnonzero(report["net.4"].dead_mask)
    until(browser, lambda: browser.execute_script("return copied") == [", ".join(map(str, dead))])
