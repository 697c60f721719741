"""The demo's picture: its lines, bars and labels say the comparison's own numbers."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neuronscope.demo.picture import comparison_png, draw_comparison
from neuronscope.demo.program import run_demo
from neuronscope.demo.recipe import VARIANTS
from neuronscope.demo.results import Comparison, Epoch, Moment, Network, Run
from neuronscope.errors import MissingExtraError

pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra `demo`)")

STEPS = (0, 45, 90, 135)
DEAD = {"ReLU": (1, 1, 30, 30), "GELU": (0, 0, 0, 1), "ReLU-no-spike": (1, 2, 3, 4)}


def comparison(seeds: int = 3) -> Comparison:
    """Three variants of two layers of 50 neurons; the spike lies between steps 45 and 90."""
    runs = []
    for name, dead in DEAD.items():
        for seed in range(seeds):
            scans = tuple(
                Moment(step, (count + seed, 0), (0, 0), (7, 0), (0, 0), 0.5, 0.1, 0)
                for step, count in zip(STEPS, dead, strict=True)
            )
            epochs = tuple(Epoch(step, (0, 0), (0, 0), 1.0, 0.9 + seed / 100) for step in STEPS[1:])
            runs.append(Run(name, seed, scans, epochs, 0, 0, True, 1.0))
    recipe = {"layers": 2, "width": 50, "images": 1437, "spike_factor": 20.0, "spike_epochs": (2, 2)}
    return Comparison(recipe, {name: Network(name, 100, 1000) for name in DEAD}, tuple(runs), {})


def test_lines_are_means_and_bands_are_standard_deviations() -> None:
    dead, dormant, *_ = draw_comparison(comparison()).axes
    lines = {line.get_label(): line for line in dead.lines}
    assert list(lines) == ["ReLU", "GELU", "no spike"]
    for (name, counts), line in zip(DEAD.items(), lines.values(), strict=True):
        assert line.get_xdata() == pytest.approx(STEPS)
        assert line.get_ydata() == pytest.approx([count + 1 for count in counts]), name  # seeds add 0, 1 and 2 neurons
    band = dead.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((1.0, 32.0))  # 2 ± 1 and 31 ± 1
    assert dormant.lines[0].get_ydata() == pytest.approx([7] * 4)
    assert lines["no spike"].get_linestyle() != lines["ReLU"].get_linestyle()


def test_lines_are_labelled_at_their_ends_and_labels_do_not_overlap() -> None:
    figure = draw_comparison(comparison())
    figure.draw_without_rendering()
    named = [text for text in figure.axes[0].texts if text.get_text().split("  ")[0] in ("ReLU", "GELU", "no spike")]
    assert {text.get_text() for text in named} == {"ReLU  31 %", "GELU  2.0 %", "no spike  5.0 %"}
    boxes = sorted((text.get_window_extent() for text in named), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 for low, high in zip(boxes[:-1], boxes[1:]))
    width, height = figure.canvas.get_width_height()
    for panel in figure.axes:
        for text in (*panel.texts, panel.title, *panel.get_yticklabels()):
            box = text.get_window_extent()
            assert 0 <= box.x0 <= box.x1 <= width
            assert 0 <= box.y0 <= box.y1 <= height


def test_a_variant_has_the_same_colour_whichever_others_are_shown() -> None:
    whole = comparison()
    part = replace(whole, networks={"GELU": whole.networks["GELU"]}, runs=tuple(whole.of("GELU")))
    assert draw_comparison(part).axes[0].lines[0].get_color() == draw_comparison(whole).axes[0].lines[1].get_color()


def test_rows_are_as_high_whether_few_or_many_variants_are_shown() -> None:
    whole = comparison()
    part = replace(whole, networks={"GELU": whole.networks["GELU"]}, runs=tuple(whole.of("GELU")))
    heights = []
    for made in (whole, part):
        figure = draw_comparison(made)
        figure.draw_without_rendering()
        heights.append(
            [
                figure.axes[2].patches[0].get_window_extent().height,
                *(panel.get_window_extent().height for panel in figure.axes[:2]),
            ]
        )
    assert heights[0] == pytest.approx(heights[1])


def test_the_spike_is_shaded_and_named() -> None:
    for panel in draw_comparison(comparison()).axes[:2]:
        (shade,) = panel.patches
        assert (shade.get_x(), shade.get_x() + shade.get_width()) == pytest.approx((45, 90))
    said = [text.get_text() for text in draw_comparison(comparison()).axes[0].texts]
    assert "learning rate × 20" in said


def test_every_variant_is_a_row_of_numbers_and_a_bar_of_its_own_neurons() -> None:
    made = comparison()
    made = replace(made, networks={**made.networks, "GELU": Network("GELU", 50, 1000)})  # half as many neurons
    ends = draw_comparison(made).axes[2]
    rows = [[text.get_text() for text in ends.texts[4 * row : 4 * row + 4]] for row in range(3)]
    assert rows == [
        ["ReLU", "31", "7.0", "91.0 ± 1.0"],
        ["GELU", "4.0", "14", "91.0 ± 1.0"],
        ["ReLU-no-spike", "5.0", "7.0", "91.0 ± 1.0"],
    ]
    bars = [(bar.get_x(), bar.get_width()) for bar in ends.patches]
    expected = [(0, 1), (0, 0.31), (0.31, 0.07), (0, 1), (0, 0.04), (0.04, 0.14), (0, 1), (0, 0.05), (0.05, 0.07)]
    assert np.array(bars) == pytest.approx(np.array(expected))
    assert ends.yaxis_inverted()  # the first at the top


def test_one_seed_has_no_deviation() -> None:
    figure = draw_comparison(comparison(seeds=1))
    assert any("one seed, so no deviation" in text.get_text() for text in figure.texts)
    assert figure.axes[2].texts[3].get_text() == "90.0"
    assert comparison_png(comparison(seeds=1)).startswith(b"\x89PNG")


def test_the_chart_does_not_depend_on_the_users_matplotlib_settings() -> None:
    import matplotlib

    first = comparison_png(comparison())
    with Image.open(io.BytesIO(first)) as picture:
        assert picture.width == 1200
        edges = np.asarray(picture.convert("RGB"))
    paper = edges[0, 0]
    assert all((edge == paper).all() for edge in (edges[:20], edges[-20:], edges[:, :20], edges[:, -20:]))
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "lines.linewidth": 9}):
        settings = dict(matplotlib.rcParams)
        assert comparison_png(comparison()) == first
        assert dict(matplotlib.rcParams) == settings


def test_drawing_the_chart_does_not_touch_pyplot() -> None:
    code = (
        "import sys, neuronscope.demo.program; assert 'matplotlib' not in sys.modules\n"
        "from neuronscope.demo.picture import import_matplotlib; import_matplotlib()\n"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_matplotlib_is_reported_before_any_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (the extra `demo`)")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"matplotlib .* pip install 'neuronscope\[demo\]'"):
        run_demo(tmp_path / "out", 1, quick=True)
    assert not (tmp_path / "out").exists()


def test_every_line_of_the_picture_is_one_of_the_demos_variants() -> None:
    from neuronscope.demo.picture import _LINES

    assert _LINES.keys() <= {variant.name for variant in VARIANTS}


def test_the_rows_of_all_variants_fit_with_their_labels_and_widest_numbers() -> None:
    (*_, run) = comparison().of("ReLU")
    scans = tuple(replace(scan, dead=(38, 0), dormant=(38, 0)) for scan in run.scans)
    runs = [replace(run, variant=each.name, seed=seed, scans=scans) for each in VARIANTS for seed in range(2)]
    runs = [replace(each, epochs=(replace(each.epochs[-1], accuracy=0.3 + each.seed / 2),)) for each in runs]
    networks = {each.name: Network(each.label, 100, 1000) for each in VARIANTS}
    figure = draw_comparison(replace(comparison(), networks=networks, runs=tuple(runs)))
    figure.draw_without_rendering()
    width, height = figure.canvas.get_width_height()
    for panel in figure.axes:
        boxes = [text.get_window_extent() for text in panel.texts]
        assert all(0 <= box.x0 <= box.x1 <= width and 0 <= box.y0 <= box.y1 <= height for box in boxes)
    rows = [each.get_window_extent() for each in figure.axes[2].texts]
    for row in range(len(VARIANTS)):
        cells = rows[4 * row : 4 * row + 4]
        assert all(left.x1 < right.x0 for left, right in zip(cells[:-1], cells[1:]))
        assert cells[0].x1 < figure.axes[2].get_window_extent().x0  # the label ends before the bar begins
    labels = [[text.get_window_extent() for text in panel.texts] for panel in figure.axes[:2]]
    beside = [tick.get_window_extent().x0 for tick in figure.axes[1].get_yticklabels()]
    assert max(box.x1 for box in labels[0]) < min(beside)  # the labels of the left lines end before the right panel
    assert max(box.y1 for box in rows) < min(box.y0 for boxes in labels for box in boxes)  # and the rows lie below all
