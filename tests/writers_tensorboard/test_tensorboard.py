"""The TensorBoard writer, read back with TensorBoard's own reader."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronscope.errors import UsageError
from neuronscope.report.report import LEVEL_DEAD, LEVEL_NOT_FINITE, LEVEL_SILENT, LEVEL_UNSEEN, NotMeasured
from neuronscope.sites import IncomingRows
from neuronscope.writers.formatting import visible
from neuronscope.writers.grouping import group_sites
from neuronscope.writers.markdown_text import plain
from neuronscope.writers.report_bytes import from_bytes
from neuronscope.writers.tensorboard import Dashboard, diagnosis, scalars, write
from neuronscope.writers.tensorboard.tags import MOST_CHARTS, card_name, group_tag, safe

from . import samples

torch_writer = pytest.importorskip("torch.utils.tensorboard", reason="TensorBoard is not installed")
event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
tensor_util = pytest.importorskip("tensorboard.util.tensor_util")
plugin_util = pytest.importorskip("tensorboard.plugin_util")

GOLDEN = Path(__file__).parent / "golden" / "diagnosis.md"

SITES = [f"features.{i}/relu" for i in (0, 3, 6, 9, 12, 15)]
SCALARS = {
    "neuronscope/dead_pct",
    "neuronscope/dormant_pct",
    "neuronscope/deaths_total",
    "neuronscope/worst_layer_dead_pct",
    "neuronscope.more/collapsed_layers",
    "neuronscope.more/not_finite_pct",
    "neuronscope.more/silent_pct",
    "neuronscope.more/deaths",
    "neuronscope.more/revivals",
    "neuronscope.more/born_dead_pct",
    "neuronscope.more/cut_off_pct",
    *(f"neuronscope.{metric}/{card_name(site)}" for metric in ("dead_pct", "dormant_pct") for site in SITES),
}
IMAGES = {"neuronscope/overview", *(f"neuronscope.neurons/{card_name(site)}" for site in SITES)}
REPORT = "neuronscope/report"


def summary_writer(kind: str, folder: Path) -> Any:
    """A writer of torch's or of tensorboardX's."""
    if kind == "torch":
        return torch_writer.SummaryWriter(str(folder))
    return pytest.importorskip("tensorboardX").SummaryWriter(str(folder))


def read(folder: Path | str) -> Any:
    """Everything in an event folder."""
    found = event_accumulator.EventAccumulator(
        str(folder), size_guidance=dict.fromkeys(("scalars", "images", "tensors"), 0)
    )
    found.Reload()
    return found


@pytest.mark.parametrize("kind", ["torch", "tensorboardX"])
def test_tensorboard_reads_back_what_was_written(kind: str, tmp_path: Path) -> None:
    report = samples.conv_net()
    with summary_writer(kind, tmp_path) as writer:
        write(report, writer, 4000)
    found = read(tmp_path)
    assert set(found.Tags()["scalars"]) == SCALARS
    assert set(found.Tags()["images"]) == IMAGES
    assert set(found.Tags()["tensors"]) == {REPORT, "neuronscope/diagnosis/text_summary"}
    (event,) = found.Scalars("neuronscope/dead_pct")
    assert event.step == 4000
    assert event.value == pytest.approx(report.dead_percent)
    (picture,) = found.Images("neuronscope/overview")
    assert (picture.width, picture.height) == (784, 430)


@pytest.mark.parametrize("kind", ["torch", "tensorboardX"])
def test_the_tab_gets_the_report_itself(kind: str, tmp_path: Path) -> None:
    report = samples.conv_net()
    with summary_writer(kind, tmp_path) as writer:
        write(report, writer, 4000, images=False, text=False)
    found = read(tmp_path)
    (event,) = found.Tensors(REPORT)
    assert from_bytes(tensor_util.make_ndarray(event.tensor_proto).tobytes()).to_html() == report.to_html()
    metadata = found.SummaryMetadata(REPORT)
    assert metadata.plugin_data.plugin_name == "neuronscope"
    assert metadata.data_class == 2  # DATA_CLASS_TENSOR; without it the run does not show
    assert json.loads(metadata.plugin_data.content) == {"phase": "train"}


def test_each_phase_has_tags_of_its_own(tmp_path: Path) -> None:
    train, val = scalars(samples.conv_net()), scalars(samples.conv_net(phase="val"))
    assert not set(train) & set(val)
    assert {"neuronscope/val_dead_pct", "neuronscope.val_dead_pct/features.0--relu"} <= set(val)
    unknown = [tag for tag in val if "cut_off" in tag or "silent" in tag]
    assert not unknown, "no gradient is seen in validation: nothing can be said"
    assert not [tag for tag in val if "deaths" in tag]
    with summary_writer("torch", tmp_path) as writer:
        write(samples.conv_net(phase="val"), writer, 1)
    tags = read(tmp_path).Tags()
    assert {"neuronscope/val_overview", "neuronscope.val_neurons/features.0--relu"} <= set(tags["images"])
    assert {"neuronscope/val_diagnosis/text_summary", "neuronscope/val_report"} <= set(tags["tensors"])


def test_the_scalars_equal_the_numbers_of_the_report() -> None:
    report = samples.conv_net()
    found = scalars(report)
    assert found["neuronscope/dead_pct"] == pytest.approx(100 * report.dead / report.neurons)
    assert found["neuronscope/dormant_pct"] == pytest.approx(100 * report.dormant / report.neurons)
    assert found["neuronscope.more/silent_pct"] == pytest.approx(100 * report.silent / report.neurons)
    assert report.silent
    worst = max(100 * site.dead / site.neurons for site in report.layers)
    assert found["neuronscope/worst_layer_dead_pct"] == pytest.approx(worst)
    assert found["neuronscope.more/collapsed_layers"] == 0.0
    assert found["neuronscope.more/born_dead_pct"] == pytest.approx(100 * report.born_dead / report.neurons)
    assert found["neuronscope.more/cut_off_pct"] == pytest.approx(100 * report.cut_off / report.neurons)
    assert found["neuronscope.dead_pct/features.15--relu"] == pytest.approx(100 * report["features.15/relu"].dead / 512)


def test_a_quantity_that_was_not_seen_has_no_scalar() -> None:
    found = scalars(samples.uniform(LEVEL_UNSEEN))
    assert [tag for tag in found if tag.rpartition("/")[2].endswith("pct") or "_pct/" in tag] == []
    mixed = samples.report_of([samples.uniform(LEVEL_UNSEEN).layers[0], samples.conv_net().layers[5]])
    assert [tag for tag in scalars(mixed) if tag.startswith("neuronscope.dead_pct/")] == [
        "neuronscope.dead_pct/features.15--relu"
    ]


def test_a_network_of_nan_has_no_dead_share() -> None:
    found = scalars(samples.uniform(LEVEL_NOT_FINITE))
    assert found["neuronscope.more/not_finite_pct"] == 100.0
    assert not [tag for tag in found if "dead_pct" in tag or "dormant" in tag]
    assert all(np.isfinite(value) for value in found.values())


def test_a_layer_counts_as_collapsed_from_nine_dead_in_ten() -> None:
    def layer(name: str, dead: int, neurons: int) -> Any:
        row = [LEVEL_DEAD] * dead + [100] * (neurons - dead)
        return samples.site_of(name, np.array([row], np.uint8), samples.windows(1))

    fine, fallen = layer("a/relu", 89, 100), layer("b/relu", 90, 100)
    single = layer("c/relu", 1, 1)  # an only neuron says nothing of a layer
    found = scalars(samples.report_of([fine, fallen, single]))
    assert found["neuronscope.more/collapsed_layers"] == 1.0
    assert found["neuronscope/worst_layer_dead_pct"] == pytest.approx(90.0)
    assert scalars(samples.report_of([fine]))["neuronscope.more/collapsed_layers"] == 0.0
    assert "neuronscope/worst_layer_dead_pct" not in scalars(samples.report_of([single]))


def test_tags_stay_few_and_the_same_in_a_network_of_hundreds_of_sites(tmp_path: Path) -> None:
    early = samples.many_sites()
    late = replace(early, global_step=2400, layers=tuple(replace(site, name=other.name) for site, other in zip(
        early.layers, reversed(early.layers), strict=True))[::-1])  # fmt: skip
    assert [site.name for site in late.layers] == [site.name for site in early.layers]
    with summary_writer("torch", tmp_path) as writer:
        write(early, writer, 1200, tab=False)
        first = read(tmp_path).Tags()
        write(late, writer, 2400, tab=False)
    both = read(tmp_path).Tags()
    assert {kind: set(tags) for kind, tags in first.items() if tags} == {
        kind: set(tags) for kind, tags in both.items() if tags
    }
    assert sum(tag.startswith("neuronscope.dead_pct/") for tag in both["scalars"]) <= MOST_CHARTS
    assert sorted(both["images"]) == sorted(
        ["neuronscope/overview", *(f"neuronscope.neurons/worst-{i}" for i in range(1, 9))]
    )


def test_charts_of_groups_pool_their_neurons() -> None:
    report = samples.many_sites()
    found = scalars(report)
    group = group_sites([site.name for site in report.layers], MOST_CHARTS)[-1]
    sites = [report[name] for name in group.sites]
    assert len(sites) > 1
    expected = 100 * sum(site.dead for site in sites) / sum(site.neurons for site in sites)
    assert found[f"neuronscope.dead_pct/{group_tag(group)}"] == pytest.approx(expected)


def test_every_death_between_two_logs_is_counted_once(tmp_path: Path) -> None:
    logged = (3, 4, 11, 26, 40)
    with summary_writer("torch", tmp_path) as writer:
        dashboard = Dashboard(writer)
        for upto in logged:
            assert dashboard.write(samples.conv_net(upto), images=False, text=False, tab=False)
    found, whole = read(tmp_path), samples.conv_net()
    for tag, name in (("deaths", "deaths"), ("revivals", "revivals")):
        events = found.Scalars(f"neuronscope.more/{tag}")
        assert [event.step for event in events] == [upto * 100 for upto in logged]
        # Every neuron was seen in every window, so the history's own count is the sum over the logs.
        assert (
            sum(event.value for event in events) == sum(int(getattr(s.history, name).sum()) for s in whole.layers) > 0
        )
    so_far = [event.value for event in found.Scalars("neuronscope/deaths_total")]
    deaths = [event.value for event in found.Scalars("neuronscope.more/deaths")]
    assert np.diff(so_far).tolist() == deaths[1:], "whatever a chart smooths away, the total's rises are the deaths"


@pytest.mark.parametrize(
    ("column", "since", "wanted"),
    [
        ([9, LEVEL_DEAD, LEVEL_DEAD], None, (0, 0)),  # only the last window: nothing new
        ([9, LEVEL_DEAD, LEVEL_DEAD], 0, (1, 0)),
        ([LEVEL_DEAD, LEVEL_DEAD, 9], None, (0, 1)),
        ([9, LEVEL_UNSEEN, LEVEL_DEAD], None, (1, 0)),  # not seen in between: compared with the window before
        ([LEVEL_DEAD, LEVEL_NOT_FINITE, LEVEL_NOT_FINITE], 0, (0, 0)),  # going NaN is no revival
        ([LEVEL_DEAD, LEVEL_UNSEEN, 9], 100, (0, 1)),
        # silent: it does not fire, and it is not dead; what counts is the window before or after
        ([9, LEVEL_SILENT, LEVEL_SILENT], 0, (0, 0)),
        ([9, LEVEL_SILENT, LEVEL_DEAD], 0, (1, 0)),
        ([LEVEL_DEAD, LEVEL_SILENT, LEVEL_DEAD], 0, (0, 0)),
        ([LEVEL_DEAD, LEVEL_SILENT, 9], 0, (0, 1)),
        ([LEVEL_UNSEEN, LEVEL_DEAD, LEVEL_DEAD], 0, (0, 0)),  # dead when first seen: no death was observed
        ([LEVEL_DEAD, 9, LEVEL_DEAD], 0, (1, 1)),
        ([LEVEL_DEAD, 9, LEVEL_DEAD], 300, (0, 0)),  # all windows were logged before
        ([LEVEL_DEAD], 0, (0, 0)),
        ([], 0, (0, 0)),
    ],
)
def test_deaths_and_revivals_equal_those_counted_by_hand(
    column: list[int], since: int | None, wanted: tuple[int, int]
) -> None:
    levels = np.array(column, np.uint8).reshape(-1, 1)
    site = samples.site_of("act", levels, samples.windows(len(column)))
    found = scalars(samples.report_of([site]), since=since)
    assert tuple(found.get(f"neuronscope.more/{name}", 0) for name in ("deaths", "revivals")) == wanted


def test_logged_steps_never_decrease(tmp_path: Path) -> None:
    with summary_writer("torch", tmp_path) as writer:
        dashboard = Dashboard(writer)
        options = {"images": False, "text": False, "tab": False}
        assert dashboard.write(samples.conv_net(10), 50, **options)
        assert not dashboard.write(samples.conv_net(10), 50, **options)
        assert not dashboard.write(samples.conv_net(11), 49, **options)
        assert dashboard.write(samples.conv_net(10, phase="val"), 40, **options), "a phase has steps of its own"
        resumed = Dashboard(writer)
        resumed.load_state_dict(json.loads(json.dumps(dashboard.state_dict())))
        assert not resumed.write(samples.conv_net(12), 50, **options)
        assert resumed.write(samples.conv_net(12), 51, **options)
    assert [event.step for event in read(tmp_path).Scalars("neuronscope/dead_pct")] == [50, 51]


@pytest.mark.parametrize("state", [None, [1], {"train": 3}, {"train": ["a", "b"]}])
def test_an_invalid_state_of_the_writer_is_refused(state: Any) -> None:
    with pytest.raises(UsageError, match=r"Dashboard\.state_dict"):
        Dashboard(object()).load_state_dict(state)  # type: ignore[arg-type]


NAMES = st.text(max_size=200) | st.text("ab.()/#+:,1 -_", max_size=10)


@given(st.lists(NAMES, min_size=2, max_size=2, unique=True))
def test_names_made_safe_for_tags_stay_distinct(names: list[str]) -> None:
    one, two = (safe(name) for name in names)
    assert re.fullmatch(r"[\w.-]+(/[\w.-]+)?", one, re.ASCII)
    cards = [card_name(name) for name in names]
    assert cards[0] != cards[1]
    assert re.fullmatch(r"[\w.-]+(/[\w.-]+)?", cards[0], re.ASCII)
    assert len(one) <= 140
    assert one != two


@pytest.mark.parametrize(
    "pair",
    [
        *(("relu()", "relu"), ("a#1", "a-1"), ("a#1", "a"), ("a/b", "a_b"), ("relu()", "relu-fn"), ("", "root")),
        *(("a(1)/relu", "a-1/relu"), ("a(1:2)/relu", "a(1,2)/relu"), ("a(12)/relu", "a(1:2)/relu")),
        *(
            ("a/b c", "a/b-c"),
            ("a/b c", "a/b_c"),
            ("a/relu#1", "a/relu-1"),
            ("a+b/relu", "a_b/relu"),
            ("a/b/c", "a_b/c"),
        ),
    ],
)
def test_names_that_look_alike_have_distinct_tags(pair: tuple[str, str]) -> None:
    assert safe(pair[0]) != safe(pair[1])


@given(st.text(max_size=100) | st.text("|<>&*_`[]()!#\\-x1. \n", max_size=30))
def test_escaped_text_shows_as_it_is_in_tensorboard(text: str) -> None:
    html = plugin_util.markdown_to_safe_html(f"| site |\n|---|\n| x{plain(text)}x |")
    shown = re.findall(r"<td>(.*)</td>", html)
    assert [unescape(cell) for cell in shown] == [f"x{visible(text)}x"]
    assert not re.search(r"<(?!/?(table|thead|tbody|tr|th|td)\b)", html)


def test_the_diagnosis_escapes_every_name() -> None:
    evil = "x|<script>alert(1)</script>[a](javascript:b)*_`\n# heading"
    site = replace(samples.conv_net().layers[5], name=evil, activation=evil)
    report = samples.report_of([site], model=evil, phase=evil, not_measured=[NotMeasured(evil, evil)], notes=[evil])
    text = diagnosis(report)
    assert not set("<>[]`|_#") & set(re.sub(r"^### |&#\d+;|^\|.*\|$", "", text, flags=re.MULTILINE))
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {12}, "eleven columns"
    html = plugin_util.markdown_to_safe_html(text)
    assert "<script" not in html
    assert "<a" not in html
    assert html.count("<h1") == 0
    assert "&lt;script&gt;" in html or "&#60;script&#62;" in html


def test_the_diagnosis_text_equals_the_stored_text() -> None:
    report = samples.conv_net()
    report = replace(
        report,
        notes=("No gradients were seen in 2 of 40 windows.",),
        not_measured=(NotMeasured("head.attn", "runs in a fused kernel"),),
    )
    text = diagnosis(report)
    if os.environ.get("NEURONSCOPE_REWRITE_GOLDENS"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_the_diagnosis_names_the_weights_of_layers_with_idle_neurons() -> None:
    report = samples.conv_net()
    layers = [
        replace(site, incoming=(IncomingRows(site.name, 0, site.neurons, 0, 1),), reader_notes=("added in",))
        for site in report.layers
    ]
    text = diagnosis(replace(report, layers=tuple(layers)))
    block = text.partition("**Weights of layers with idle neurons**, worst first:\n\n")[2].partition("\n\n")[0]
    worst = max(layers, key=lambda site: site.dead / site.neurons)
    assert worst.name in unescape(block).splitlines()[0]
    assert "not known exactly: added in" in unescape(block)
    assert len(block.splitlines()) == sum(bool(site.dead or site.silent or site.dormant) for site in layers) <= 10


def test_what_happened_why_and_what_to_do_stand_before_the_numbers() -> None:
    text = diagnosis(samples.conv_net())
    parts = ("neurons are dead", "**Why, and what to do**", "**What to do**", "### ConvNet", "Based on", "| layer |")
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    fallen = diagnosis(samples.uniform(LEVEL_DEAD))
    assert fallen.startswith("**Layer `layers.0/relu` is dead from the start: 96 of 96 neurons.**")


def test_the_diagnosis_states_causes_where_there_is_evidence() -> None:
    assert "**Why, and what to do**" in diagnosis(samples.conv_net())
    assert "Why, and what to do" not in diagnosis(samples.uniform(100))


@pytest.mark.parametrize(
    ("level", "sentence"),
    [
        (LEVEL_UNSEEN, "**No neuron was observed, so there is no verdict.**"),
        (LEVEL_NOT_FINITE, "NaN or infinite"),
        (LEVEL_DEAD, "384 of 384 neurons are dead (100 %). All of them"),
        (100, "No layer has dead, silent, dormant, cut-off or non-finite neurons."),
    ],
)
def test_the_diagnosis_states_each_problem_of_the_network(level: int, sentence: str) -> None:
    assert sentence in diagnosis(samples.uniform(level))


def test_the_diagnosis_of_many_sites_is_short_and_states_what_it_leaves_out() -> None:
    text = diagnosis(samples.many_sites())
    assert len(text.splitlines()) < 75
    assert "more layers have such neurons" in text


def test_using_a_closed_writer_raises_an_error(tmp_path: Path) -> None:
    from neuronscope.writers.tensorboard.dashboard import _add_summary, tab_summary

    writer = summary_writer("torch", tmp_path)
    writer.close()
    with pytest.raises(UsageError, match="was closed"):
        _add_summary(writer, tab_summary(samples.conv_net(1)), 1)


def test_importing_the_writer_loads_nothing_heavy() -> None:
    code = (
        "import neuronscope.writers.tensorboard, sys;"
        "sys.exit(' '.join(name for name in ('torch', 'tensorboard', 'PIL', 'tensorboardX') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.stderr.strip() == ""
