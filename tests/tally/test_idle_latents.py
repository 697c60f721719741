"""For how many tokens a latent has not fired, and how densely it fires: over windows, states, ranks and writers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.errors import UsageError
from neuronscope.report.reading import report_from_dict
from neuronscope.sites import SiteInfo
from neuronscope.tally.census import Census, Tally
from neuronscope.tally.distributed.reduce_layout import ReduceLayout, whole_site

LATENTS = 12


def batch(draw: torch.Generator, step: int) -> Tensor:
    """Return latents (B, N) of a size that changes; latent ``i`` fires ever more seldom, the first never."""
    rows = 3 + step % 4
    fires = torch.rand(rows, LATENTS, generator=draw) < 0.5 ** torch.arange(LATENTS, dtype=torch.float32)
    fires[:, 0] = False
    return fires * torch.rand(rows, LATENTS, generator=draw).clamp(min=0.1)


def run(steps: int, every: int = 1, resume_at: int = -1) -> tuple[ns.Scope, npt.NDArray[np.int64]]:
    """Count batches of latents; return the scope, and the tokens since each fired, counted as the libraries do."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    scope = ns.watch(model, window_steps=7, every_n_steps=every, examples=None)
    draw, since = torch.Generator().manual_seed(0), np.zeros(LATENTS, dtype=np.int64)
    for step in range(steps):
        calls = [batch(draw, step), batch(draw, step + 1)]  # two micro-batches
        for latents in calls:
            scope.count("latents", latents)
        if step % every == 0:
            since += sum(len(latents) for latents in calls)
            since[torch.cat(calls).any(0).numpy()] = 0
        scope.step()
        if step == resume_at:
            state = scope.state_dict()
            scope.detach()
            scope = ns.watch(model, window_steps=7, every_n_steps=every, examples=None)
            scope.load_state_dict(state)
    return scope, since


@pytest.mark.parametrize(("steps", "every", "resume_at"), [(5, 1, -1), (30, 1, -1), (30, 3, -1), (30, 1, 10)])
def test_idle_tokens_are_those_of_a_running_count(steps: int, every: int, resume_at: int) -> None:
    scope, since = run(steps, every, resume_at)
    tally = scope.census()["latents"]
    assert tally.idle_positions is not None
    assert tally.idle_positions.tolist() == since.tolist()
    assert tally.idle_positions[0] == tally.positions
    assert 0 < np.count_nonzero(since == 0) < LATENTS
    scope.detach()


def test_a_step_that_is_not_over_counts_for_what_did_not_fire_in_it() -> None:
    scope, since = run(9)
    scope.count("latents", torch.eye(LATENTS)[:3])
    expected = since + 3
    expected[:3] = 0
    idle = scope.census()["latents"].idle_positions
    assert idle is not None
    assert idle.tolist() == expected.tolist()
    scope.detach()


def test_on_several_ranks_a_latent_is_idle_since_the_last_step_in_which_any_fired() -> None:
    draw = np.random.default_rng(0)
    steps, sizes = 6, draw.integers(1, 5, (2, 6))
    fired = draw.random((2, steps, LATENTS)) < 0.15
    censuses = []
    for rank in range(2):
        last = np.where(fired[rank].any(0), steps - 1 - fired[rank][::-1].argmax(0), -1)
        until = np.cumsum(sizes[rank])
        info = SiteInfo(activation="topk", kind="sparse", linear_when_on=False, axis=1, axis_source="declared")
        first = np.where(fired[rank].any(0), fired[rank].argmax(0), 2**62)
        empty = Tally.empty(info, LATENTS)
        tally = Tally(
            **{
                **{name: getattr(empty, name) for name in vars(empty)},
                "last_active_step": last,
                "first_active_step": first,
                "positions": int(until[-1]),
                "step_positions": tuple(zip(range(steps), until.tolist(), strict=True)),
            }
        ).with_idle()
        censuses.append(Census({"latents": tally}, first_step=0, last_step=steps - 1, steps=steps))
    layout = ReduceLayout((0, "train"), {"latents": whole_site(censuses[0]["latents"])})
    maxima = np.maximum(*(_steps(layout, census) for census in censuses))
    sums = [_sums(layout, census, maxima) for census in censuses]
    joined = layout.reduce(
        censuses[0],
        _Answers([maxima, sum(one[0] for one in sums), sum(one[1] for one in sums)]),  # type: ignore[arg-type]
        duplicate=False,
    )["latents"]
    together = fired.any(0)
    expected = [
        int(sizes[:, (np.flatnonzero(together[:, latent]).max(initial=-1) + 1) :].sum()) for latent in range(LATENTS)
    ]
    assert joined.idle_positions is not None
    assert joined.idle_positions.tolist() == expected
    assert joined.positions == sizes.sum()


class _Answers:
    """Collectives that give what all ranks bring, in the order in which they are asked."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers
        self.brought: list[Any] = []

    def max(self, values: Any) -> None:
        self.brought.append(values.copy())
        if self.answers:
            values[...] = self.answers.pop(0)

    def sum(self, values: Any) -> None:
        self.max(values)


def _steps(layout: ReduceLayout, census: Any) -> Any:
    collectives = _Answers([])
    layout.reduce(census, collectives, duplicate=False)  # type: ignore[arg-type]
    return collectives.brought[0]


def _sums(layout: ReduceLayout, census: Any, maxima: Any) -> Any:
    collectives = _Answers([maxima])
    layout.reduce(census, collectives, duplicate=False)  # type: ignore[arg-type]
    return collectives.brought[1:]


def test_density_histogram_counts_each_latent_that_fired_once() -> None:
    scope, _ = run(30)
    site = scope.report()["latents"]
    counts, edges = site.density_histogram(bins_per_decade=3)
    assert counts.sum() == np.count_nonzero(site.zero_output_fraction < 1)
    fired = site.positions - np.rint(site.zero_output_fraction * site.positions)
    assert np.allclose(10 ** site.log10_density[fired > 0] * site.positions, fired[fired > 0])
    assert np.isneginf(site.log10_density[fired == 0]).all()
    assert edges[-1] == 0
    assert 10 ** edges[0] <= 1 / site.positions
    scope.detach()


def test_what_is_shown_says_it_in_tokens_and_has_no_dormant_column(tmp_path: Path) -> None:
    scope, since = run(28)  # four whole windows
    report = scope.report()
    text, page = str(report), report.to_html()
    assert "dor-" not in text
    assert "dormant" not in report.to_markdown().partition("### Words")[0]
    assert f"{np.count_nonzero(since >= 100)} not in the last 100 tokens" in " ".join(text.split())
    assert "How often latents fire" in page
    assert page.count('class="fired"') == len(report["latents"].density_histogram()[0])
    plain = json.loads(report.to_json())
    assert report_from_dict(plain).to_json() == report.to_json()
    assert plain["layers"][0]["idle_positions"] == since.tolist()
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from neuronscope.writers.tensorboard.dashboard import write

    write(report, writer, 3)
    writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    (event,) = events.Histograms("neuronscope.log10_density/latents")
    assert event.histogram_value.num == np.count_nonzero(report["latents"].zero_output_fraction < 1)
    assert not [tag for tag in events.Tags()["scalars"] if "dormant" in tag]
    scope.detach()


def test_other_kinds_keep_no_such_number() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with ns.watch(model) as scope:
        model(torch.randn(3, 2))
        scope.step()
    with pytest.raises(UsageError, match=r"scope\.count"):
        scope.report()["0/relu"].not_fired_in(10)
