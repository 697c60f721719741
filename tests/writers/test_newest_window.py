"""Every writer shows the newest window of a phase: no headline contradicts the last column of its own map.

The network is a row of gates: unit i fires exactly where input i is positive, so that a story scripts which units are
dead in each pass. What a writer says is read back from what it wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from html import unescape
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.judge.verdicts import rate_bound
from neuronscope.report.report import LEVEL_DEAD, LEVEL_UNSEEN, Report
from neuronscope.writers import table
from neuronscope.writers.packing import Packed, Resolution
from neuronscope.writers.pictures import heatmap, overview
from neuronscope.writers.pictures.canvas import Canvas
from neuronscope.writers.pictures.colours import DEAD, share_colours
from neuronscope.writers.report_bytes import from_bytes, to_bytes
from neuronscope.writers.tensorboard import diagnosis, scalars, write
from neuronscope.writers.tensorboard.tags import card_name

from .html_page import Page
from .test_html import cards
from .test_packing import unpack

UNITS = 8
NEEDED = ns.Policy().min_examples
assert NEEDED == 299

Story = tuple[tuple[int, tuple[int, ...]], ...]

#: Passes, or steps of training, each of so many examples and with these units dead.
STORIES: dict[str, Story] = {
    "one short pass": ((5, (1,)),),
    "deaths after two short passes": ((256, ()), (256, ()), (256, (0, 1, 2, 3, 4, 5)), (256, (0, 1, 2, 3, 4, 5))),
    "deaths in the very last short pass": ((40, ()), (40, ()), (40, (2, 3))),
    "long passes": ((300, (0,)), (400, (0, 1, 2))),
    "short after long": ((400, ()), (40, (0, 1, 2, 3))),
    "long after short": ((40, (0, 1, 2, 3)), (400, (3,))),
    "revivals in short passes": ((256, (0, 1, 2, 3, 4)), (256, (0, 1, 2, 3, 4)), (256, (4,))),
    "revivals after a long pass": ((400, (0, 1, 2, 3)), (40, ())),
    "nobody is left": ((298, ()), (298, tuple(range(UNITS)))),
}
PHASES = ("train", "val", "test", "probe")


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(UNITS, UNITS, bias=False)
        self.relu = nn.ReLU()
        nn.init.eye_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(x))


@dataclass(frozen=True)
class Shown:
    """What a writer says of a report: the dead in its headline, those in its map's last column, and all its words."""

    headline: int
    last_column: int | None
    words: str


@cache
def tell(story: str, phase: str) -> Report:
    """The report of a phase after a story was played in it."""
    model = Gates()
    with ns.watch(model, window_steps=1) as scope:
        for examples, dead in STORIES[story]:
            x = torch.ones(examples, UNITS)
            x[:, list(dead)] = -1.0
            if phase != "train":
                with scope.phase(phase), torch.no_grad():
                    model(x)
                x = torch.ones(2, UNITS)
            model(x).sum().backward()
            scope.step()
    return scope.report(phase)


def expected(story: str, phase: str) -> tuple[int, int, bool]:
    """Dead units and examples of the newest window, by the story alone, and whether that window has closed.

    Every pass is a window; steps of training make one as soon as they have the examples that are needed.
    """
    windows: list[list[tuple[int, tuple[int, ...]]]] = [[]]
    for part in STORIES[story]:
        windows[-1].append(part)
        if phase != "train" or sum(examples for examples, _ in windows[-1]) >= NEEDED:
            windows.append([])
    closed = [window for window in windows[:-1] if window]
    newest = closed[-1] if closed else windows[0]
    dead = set.intersection(*(set(dead) for _, dead in newest))
    return len(dead), sum(examples for examples, _ in newest), bool(closed)


def last_column(report: Report) -> int | None:
    """Dead neurons in the newest window that the report's history holds; ``None`` where it holds none."""
    (site,) = report.layers
    return int((site.history.levels[-1] == LEVEL_DEAD).sum()) if len(site.history.steps) else None


def said(text: str) -> int:
    """The dead in a text's headline."""
    if "No dead neuron among the 8" in text:
        return 0
    found = re.search(r"(\d+) of 8 neurons (?:is|are) dead", text)
    assert found, text
    return int(found[1])


def in_terminal(report: Report) -> Shown:
    text = " ".join(str(report).split())
    return Shown(said(text), last_column(report), text)


def in_markdown(report: Report) -> Shown:
    text = unescape(report.to_markdown())
    return Shown(said(text), last_column(report), text)


def in_json(report: Report) -> Shown:
    plain = json.loads(report.to_json())
    (site,) = plain["layers"]
    levels = site["history"]["levels"]
    column = levels[-1].count(LEVEL_DEAD) if levels else None
    assert site["labels"].count("dead") == site["dead"] == plain["summary"]["dead"]
    window = plain["window"]
    assert window["provisional"] is not window["long_enough"]
    words = f"Provisional: {window['bound']}" if window["provisional"] else ""
    return Shown(plain["summary"]["dead"], column, words)


def in_html(report: Report) -> Shown:
    page = Page(report.to_html())
    text = " ".join(" ".join(page.words).split())
    (site,) = page.data["layers"]
    steps = page.data["steps"][site["steps"]]
    packed = Packed(steps, len(steps), site["rows"], Resolution(256, UNITS), site["data"])
    column = int((unpack(packed, UNITS).share[:, -1] == 255).sum())
    assert cards(report)["Dead"].startswith(str(report.dead))
    return Shown(said(text), column, text)


def in_scalars(report: Report) -> Shown:
    (percent,) = [value for tag, value in scalars(report, per_site=False).items() if tag.endswith("dead_pct")][:1]
    return Shown(round(percent * UNITS / 100), last_column(report), "")


def in_diagnosis(report: Report) -> Shown:
    text = unescape(diagnosis(report))
    return Shown(said(text.replace("*", "")), last_column(report), text)


def in_tab(report: Report) -> Shown:
    return in_html(from_bytes(to_bytes(report)))


class Board:
    """Takes pictures as a SummaryWriter does."""

    def __init__(self) -> None:
        self.pictures: dict[str, Any] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...

    def add_text(self, tag: str, text_string: str, global_step: int) -> None: ...

    def add_image(self, tag: str, img_tensor: Any, global_step: int, *, dataformats: str) -> None:
        self.pictures[tag.partition("/")[2]] = img_tensor


def drawn(report: Report, name: str) -> tuple[Any, list[str]]:
    """One of the pictures that are written to TensorBoard, and the texts drawn on all of them."""
    board, texts = Board(), []
    whole = Canvas.text

    def text(canvas: Canvas, at: Any, words: str, *more: Any, **options: Any) -> None:
        texts.append(words)
        whole(canvas, at, words, *more, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Canvas, "text", text)
        write(report, board, 1, text=False, tab=False)
    return board.pictures[name if name in board.pictures else card_name(name)], texts


def share_of(texts: list[str], pattern: str) -> int:
    (found,) = [match for match in (re.fullmatch(pattern, words) for words in texts) if match]
    return round(float(found[1]) * UNITS / 100)


def in_overview(report: Report) -> Shown:
    name = "overview" if report.phase == "train" else f"{report.phase}_overview"
    picture, texts = drawn(report, name)
    headline = 0 if "No neuron is dead or dormant" in texts else share_of(texts, r"([\d.]+) % dead, 0 % dormant")
    column = None
    if "no window is closed yet" not in texts:
        edge = picture[116 + 10, : 784 - 16 - 190]  # the middle of the only row, as far as its grid reaches
        shades = share_colours(np.arange(UNITS + 1) / UNITS)
        (column,) = np.flatnonzero((shades == edge[-3]).all(axis=1))
    return Shown(headline, None if column is None else int(column), " ".join(texts))


def in_heatmap(report: Report) -> Shown:
    picture, texts = drawn(report, "fc/relu")
    column = None
    if "no window is closed yet" not in texts:
        last = picture[88 : 88 + 304, 784 - 16 - 190 - 3]
        column = round(float((last == DEAD).all(axis=1).sum()) * UNITS / 304)
    return Shown(share_of(texts, r"fc/relu: ([\d.]+) % dead"), column, " ".join(texts))


def in_figure(report: Report) -> Shown:
    figure = report.plot()
    text = " ".join(figure.get_suptitle().split())
    curves = [line for axes in figure.axes for line in axes.get_lines()]
    bars = figure.axes[-1].get_legend_handles_labels()
    dead = dict(zip(reversed(bars[1]), reversed(bars[0]), strict=True)).get("dead")
    headline = 0 if dead is None else round(dead.patches[0].get_width() * UNITS / 100)
    column = round(float(np.asarray(curves[0].get_ydata())[-1]) * UNITS / 100) if curves else None
    return Shown(headline, column, text)


def in_one_line(report: Report) -> Shown:
    line = repr(report)
    found = re.search(r"(\d+) of 8 neurons dead", line)
    assert found
    assert "\n" not in line
    return Shown(int(found[1]), last_column(report), line)


def in_table(report: Report) -> Shown:
    (dead,) = table.layer_columns(report)["dead"]
    labels = table.neuron_columns(report)["label"]
    assert list(labels).count("dead") == dead
    return Shown(dead, last_column(report), "")


WRITERS: dict[str, Callable[[Report], Shown]] = {
    "terminal": in_terminal,
    "markdown": in_markdown,
    "json": in_json,
    "html": in_html,
    "scalars": in_scalars,
    "diagnosis": in_diagnosis,
    "tab": in_tab,
    "overview": in_overview,
    "heatmap": in_heatmap,
    "figure": in_figure,
    "one line": in_one_line,
    "table": in_table,
}
#: These give numbers alone.
WORDLESS = ("scalars", "table")


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("story", STORIES)
def test_the_headline_describes_the_newest_window_and_agrees_with_the_last_column_of_the_maps(
    story: str, phase: str, writer: str
) -> None:
    report = tell(story, phase)
    dead, examples, closed = expected(story, phase)
    shown = WRITERS[writer](report)
    assert shown.headline == dead
    if closed:
        assert shown.last_column == dead
    else:  # nothing is drawn yet, or what the headline says
        assert shown.last_column in (None, dead)
    assert report["fc/relu"].examples == examples
    if writer not in WORDLESS:
        assert ("rovisional" in shown.words) == (examples < NEEDED)


@pytest.mark.parametrize("phase", ["train", "val"])
@pytest.mark.parametrize("writer", [name for name in WRITERS if name not in (*WORDLESS, "one line")])
def test_a_provisional_verdict_shows_the_bound_from_its_own_examples(writer: str, phase: str) -> None:
    # 1 - .05 ** (1 / 5) = .4507, rounded up
    said = str(rate_bound(5)) if writer == "json" else "up to 46 %"
    assert said in WRITERS[writer](tell("one short pass", phase)).words


def test_a_short_pass_says_what_it_is_based_on() -> None:
    text = " ".join(str(tell("deaths after two short passes", "val")).split())
    assert (
        "Provisional: based on 256 validation examples at step 3 (299 are needed for a bound of 1 %). "
        "A neuron called dead could still fire on up to 1.2 % of inputs (95 % confidence)."
    ) in text


def test_a_long_window_says_what_it_is_based_on() -> None:
    text = " ".join(str(tell("long passes", "train")).split())
    # 1 - .05 ** (1 / 400) = .00746
    assert (
        "Based on 400 training examples at step 1. "
        "A neuron called dead could still fire on up to 0.75 % of inputs (95 % confidence)."
    ) in text


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("phase", PHASES)
def test_a_neuron_that_was_born_dead_is_dead_in_every_column(story: str, phase: str) -> None:
    report = tell(story, phase)
    if report.window.name == "last":
        site = report["fc/relu"]
        always = (site.history.levels == LEVEL_DEAD).all(axis=0)
        assert site.born_dead == int(always.sum())
        # Who died has a step at which it died.
        assert (site.history.died_step[site.judgement.dead & ~always] >= 0).all()


class Heads(nn.Module):
    """Two heads, of which a pass may use one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Gates(), Gates()

    def forward(self, x: Tensor, *, both: bool) -> Tensor:
        return self.left(x) + self.right(x) if both else self.left(x)


def test_a_site_not_run_in_the_newest_pass_is_unseen_in_the_last_column_of_its_map() -> None:
    model = Heads()
    x = torch.ones(256, UNITS)
    x[:, :3] = -1.0
    with ns.watch(model) as scope:
        for both in (True, True, False):
            with scope.phase("val"), torch.no_grad():
                model(x, both=both)
            model(x, both=True).sum().backward()
            scope.step()
    report = scope.report("val")
    left, right = report["left.fc/relu"], report["right.fc/relu"]
    assert (left.dead, right.dead, right.unseen) == (3, 0, UNITS)
    assert left.history.dead.tolist() == [3, 3, 3]
    assert right.history.steps.tolist() == left.history.steps.tolist()
    assert (right.history.levels[-1] == LEVEL_UNSEEN).all()
    assert (heatmap(right, "val")[88 : 88 + 304, 784 - 16 - 190 - 3] != DEAD).any(axis=1).all()
    # Two rows of 56, and below them a line for "not observed" and one for "provisional".
    assert overview(report).shape == (116 + 2 * 56 + 38 + 2 * 30, 784, 3)


def test_nan_after_the_newest_window_is_reported() -> None:
    model = Gates()
    with ns.watch(model, window_steps=1) as scope:
        for examples, value in ((300, 1.0), (5, float("nan"))):
            model(torch.full((examples, UNITS), value)).sum().backward()
            scope.step()
    report = scope.report()
    assert (report.window.last_step, report.not_finite) == (0, 0)
    assert any(note.startswith("After step 0 the network gave NaN") for note in report.notes)
