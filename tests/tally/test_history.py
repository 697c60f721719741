"""Deaths and revivals at the exact step, who was born dead, and a history that stays bounded and keeps its newest
window.

The network is a row of gates: unit i fires exactly where input i is positive, so that a test scripts who fires when.
"""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import neuronscope as ns
import neuronscope.callbacks
from neuronscope.report.report import LEVEL_DEAD, LEVEL_MAX, LEVEL_UNSEEN
from neuronscope.tally import history as history_module

#: Two examples make a window sure: .5 ** 2 = .25 < 1 - .7.
SOON = ns.Policy(confidence=0.7, max_rate=0.5)
assert SOON.min_examples == 2  # log(.3) / log(.5) = 1.74


class Gates(nn.Module):
    def __init__(self, units: int) -> None:
        super().__init__()
        self.fc = nn.Linear(units, units, bias=False)
        self.relu = nn.ReLU()
        nn.init.eye_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(x))


def play(scope: ns.Scope, model: nn.Module, script: list[str]) -> None:
    """One step a column: row i of the script is unit i, ``#`` where it fires."""
    for step in range(len(script[0])):
        x = torch.tensor([1.0 if row[step] == "#" else -1.0 for row in script]).expand(2, -1)
        model(x).sum().backward()
        scope.step()


def watch(units: int, window_steps: int = 4, **options) -> tuple[ns.Scope, nn.Module]:
    model = Gates(units)
    return ns.watch(model, policy=SOON, window_steps=window_steps, **options), model


SCRIPT = [
    # step   0   4   8   12  16
    "####################",  # 0: always fires
    "....................",  # 1: born dead
    "######..............",  # 2: fires last at step 5
    "####......#.########",  # 3: dies at 4, revives at 10
    ".............#......",  # 4: born dead, fires at 13 only, dies again at 14
    "#....#....#....##...",  # 5: sparse, never dead
    "#################...",  # 6: still fires in its last window
]


def test_deaths_and_revivals_at_the_exact_step():
    scope, model = watch(len(SCRIPT))
    with scope:
        play(scope, model, SCRIPT)
    site = scope.report()["fc/relu"]
    past = site.history
    assert past.steps.tolist() == [3, 7, 11, 15, 19]
    # Unit 2 is dead in windows 3 to 5, though last seen in step 5: its death is dated to step 6.
    assert past.died_step.tolist() == [-1, -1, 6, 4, 14, -1, -1]
    assert past.revived_step.tolist() == [-1, -1, -1, 10, 13, -1, -1]
    assert past.deaths.tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert past.revivals.tolist() == [0, 0, 0, 1, 1, 0, 0]
    # Dead by window: {1, 4}, {1, 3, 4}, {1, 2, 4}, {1, 2}, {1, 2, 4}
    assert past.dead.tolist() == [2, 3, 3, 2, 3]
    assert np.flatnonzero(site.judgement.dead).tolist() == [1, 2, 4]
    assert (site.born_dead, site.died) == (1, 2)
    assert site.last_active_step.tolist() == [19, -1, 5, 19, 13, 16, 16]
    assert [(verdict.neuron, verdict.since) for verdict in scope.report().verdicts() if verdict.label == "dead"] == [
        (1, -1),
        (2, 6),
        (4, 14),
    ]
    assert past.levels.shape == (5, 7)
    assert past.levels[:, 0].tolist() == [0] * 5
    assert past.levels[:, 1].tolist() == [LEVEL_DEAD] * 5
    # Unit 5 is off in 3 of 4 steps: round(250 * 3 / 4) = 188 (187.5 to even)
    assert past.levels[:, 5].tolist() == [188] * 5


@pytest.mark.parametrize(
    ("every", "died"),
    [
        (1, 6),  # fires last at step 5
        (2, 6),  # steps 0, 2, 4, 6, 8 are observed: seen to fire last at 4, first seen silent at 6
        (3, 6),  # 0, 3, 6: fires at 3, silent at 6
        (4, 8),  # 0, 4, 8: fires at 4, silent at 8
    ],
)
def test_a_death_is_dated_to_the_first_observed_step_of_silence(every, died):
    scope, model = watch(1, every_n_steps=every)
    with scope:
        play(scope, model, ["######" + 30 * "."])
    assert scope.report()["fc/relu"].history.died_step.tolist() == [died]


def test_a_window_stays_open_until_it_has_enough_examples():
    model = Gates(2)
    # log(.05) / log(.9) = 28.4: 29 examples; 2 a step: after 4 steps 8, after 15 steps 30
    with ns.watch(model, policy=ns.Policy(max_rate=0.1), window_steps=4) as scope:
        closed = []
        for step in range(40):
            model(torch.tensor([[1.0, -1.0]]).expand(2, -1)).sum().backward()
            if scope.step():
                closed.append(step)
    assert closed == [14, 29]  # each of 15 steps
    assert scope.census(window="last").steps == 15
    assert scope.census(window="last").examples == 30
    assert scope.report().window.long_enough
    assert (scope.report().window.first_step, scope.report().window.last_step) == (15, 29)


def test_the_report_of_a_run_that_is_too_short_says_so():
    scope, model = watch(2, window_steps=100)
    with ns.watch(model) as other:
        model(torch.tensor([[1.0, -1.0]])).sum().backward()
        other.step()
    scope.detach()
    report = other.report()
    assert report.window.name == "all"
    assert report.provisional
    assert (report.examples, report.examples_needed) == (1, 299)
    (verdict,) = [verdict for verdict in report.verdicts() if verdict.label == "dead"]
    assert verdict.bound == pytest.approx(0.95)  # 1 - .05 ** 1: one example says next to nothing


def test_each_validation_pass_is_a_window_of_its_own():
    scope, model = watch(3)
    x = torch.tensor([[1.0, -1.0, 1.0]]).expand(4, -1)
    with scope:
        for number in range(6):
            with scope.phase("val"), torch.no_grad():
                model(x if number < 3 else x * torch.tensor([-1.0, 1.0, 1.0]))
            model(torch.ones(4, 3)).sum().backward()
            scope.step()
    past = scope.report("val")["fc/relu"].history
    assert past.steps.tolist() == [0, 1, 2, 3, 4, 5]
    # Unit 0 fires in passes 0 to 2 and dies in pass 3; unit 1 never fires at all.
    assert past.dead.tolist() == [1, 1, 1, 2, 2, 2]
    assert past.died_step.tolist() == [3, -1, -1]
    assert scope.census("val", "last")["fc/relu"].positions == 4
    assert scope.census("val")["fc/relu"].positions == 24


def test_a_resumed_run_judges_the_same_window():
    model = Gates(2)
    x = torch.ones(40, 2)
    with ns.watch(model, window_steps=1) as scope:
        for examples, sign in ((400, 1.0), (40, -1.0)):  # the second step is too short to close a window of training
            model(x[:1].expand(examples, -1) * sign).sum().backward()
            scope.step()
            with scope.phase("val"), torch.no_grad():
                model(x * sign)
    resumed = ns.watch(Gates(2))
    resumed.load_state_dict(scope.state_dict())
    resumed.detach()
    for phase, dead, examples in (("train", 0, 400), ("val", 2, 40)):
        for report in (scope.report(phase), resumed.report(phase)):
            assert (report.dead, report.examples, report.provisional) == (dead, examples, examples < 299)


def test_later_steps_do_not_change_what_is_reported_of_the_newest_window():
    scope, model = watch(2, window_steps=2)
    play(scope, model, ["##", ".."])
    before = scope.report()["fc/relu"]
    play(scope, model, ["#", "#"])  # a unit that never fired until then fires in the window that is open
    after = scope.report()["fc/relu"]
    assert (after.born_dead, after.died) == (before.born_dead, before.died) == (1, 0)
    assert after.last_active_step.tolist() == before.last_active_step.tolist() == [1, -1]
    assert scope.census()["fc/relu"].last_active_step.tolist() == [2, 2]


@pytest.mark.parametrize("windows", [10, 256, 257, 600, 2000])
def test_thinning_keeps_the_newest_window_and_windows_at_even_distances(windows, monkeypatch):
    monkeypatch.setattr(history_module, "MAX_WINDOWS", 16)
    scope, model = watch(2, window_steps=1)
    with scope:
        for step in range(windows):
            model(torch.tensor([[1.0, 1.0 if step % 2 else -1.0]]).expand(2, -1)).sum().backward()
            assert scope.step()
    past = scope.report()["fc/relu"].history
    assert len(past.steps) <= 17
    assert past.steps[0] == 0
    assert past.steps[-1] == windows - 1
    gaps = np.diff(past.steps)
    assert len(set(gaps[:-1].tolist())) <= 1  # even, but for the newest
    assert gaps[-1] <= max(gaps[:-1])
    assert len(past.dead) == len(past.levels) == len(past.steps)
    # Unit 1 fires in every second window: born dead at 0, revives at 1, dies at 2, … Of windows - 1 changes
    # the first and every second after it are revivals.
    assert past.revivals.tolist() == [0, windows // 2]
    assert past.deaths.tolist() == [0, (windows - 1) // 2]


def test_the_history_is_bounded_in_bytes_too(monkeypatch):
    monkeypatch.setattr(history_module, "MAX_BYTES", 1000)
    scope, model = watch(50, window_steps=1)  # 1000 bytes / 50 neurons = 20 windows
    with scope:
        play(scope, model, ["#" * 100] * 50)
    past = scope.report()["fc/relu"].history
    assert past.levels.nbytes <= 1050
    assert past.steps[-1] == 99


def test_the_state_of_a_history_survives_a_weights_only_checkpoint():
    scope, model = watch(len(SCRIPT))
    with scope:
        play(scope, model, [row[:10] for row in SCRIPT])
        file = io.BytesIO()
        torch.save(scope.state_dict(), file)
    file.seek(0)
    resumed, model = watch(len(SCRIPT))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    with resumed:
        play(resumed, model, [row[10:] for row in SCRIPT])
    whole, model = watch(len(SCRIPT))
    with whole:
        play(whole, model, SCRIPT)
    assert resumed.report().to_dict() == whole.report().to_dict() or (
        resumed.report()["fc/relu"].to_dict() == whole.report()["fc/relu"].to_dict()
    )


def test_a_site_not_run_in_a_window_is_unseen_there_and_not_dead():
    class Sometimes(Gates):
        on = True

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.on else torch.tanh(self.fc(x))

    model = Sometimes(2)
    with ns.watch(model, policy=SOON, window_steps=2) as scope:
        for step in range(6):
            model.on = step < 4
            model(torch.ones(2, 2)).sum().backward()
            scope.step()
    site = scope.report()["fc/relu"]
    assert site.judgement.unseen.all()
    assert site.dead == 0
    assert np.isnan(site.zero_output_fraction).all()
    assert LEVEL_UNSEEN not in site.history.levels or site.history.levels[-1].tolist() == [LEVEL_UNSEEN] * 2
    assert (site.history.levels <= LEVEL_MAX).all() or site.history.levels.shape[0] == 3


class Experts(nn.Module):
    """Two branches: the second runs in one of ``every`` forwards, from the second one on, or never."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.common, self.rare = Gates(3), Gates(3)
        self.every, self.calls = every, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.common(x)
        return y + self.rare(x) if self.every and (self.calls - 2) % self.every == 0 else y


def examples_of_windows(every: int, steps: int) -> list[tuple[int, list[int]]]:
    """For each window of training: the step at which it closed, and the examples of each branch, as far as it ran."""
    model = Experts(every)
    windows = []
    with ns.watch(model, policy=ns.Policy(max_rate=0.3), window_steps=2) as scope:  # 9 examples are enough
        assert scope.policy.min_examples == 9
        for step in range(1, steps + 1):
            model(torch.ones(3, 3)).sum().backward()
            if scope.step():
                windows.append((step, [tally.examples for tally in scope.census("train", "last").values()]))
    return windows


def test_a_window_waits_for_the_layer_with_the_fewest_examples():
    assert examples_of_windows(every=2, steps=12) == [(6, [18, 9]), (12, [18, 9])]


def test_a_window_does_not_wait_for_a_layer_that_runs_too_seldom():
    # Four times nine examples are the most that the common branch waits for: 12 steps of 3.
    assert examples_of_windows(every=20, steps=12)[0] == (12, [36, 3])


def test_a_window_does_not_wait_for_a_layer_that_never_runs():
    assert examples_of_windows(every=0, steps=6) == [(3, [9]), (6, [9])]


def test_a_layer_that_ran_in_an_earlier_window_only_is_not_waited_for():
    model = Experts(every=1)
    with ns.watch(model, policy=ns.Policy(max_rate=0.3), window_steps=2) as scope:
        closed = []
        for step in range(1, 10):
            model(torch.ones(3, 3)).sum().backward()
            if scope.step():
                closed.append(step)
                model.every = 0
    assert closed == [3, 6, 9]


def test_a_layer_with_too_few_examples_has_its_own_bound_and_stops_no_training():
    model = Experts(every=20)
    monitor = ns.callbacks.Monitor(
        every_n_steps=1, window_steps=2, policy=ns.Policy(max_rate=0.3), on_dead="stop", threshold=40
    )
    monitor.attach(model)
    for step in range(1, 13):
        monitor.begin_batch()
        # The rare branch runs on one batch, on which it does not fire.
        model(torch.full((3, 3), -1.0 if step == 2 else 1.0)).sum().backward()
        report = monitor.step(step)
    assert report is not None
    assert [layer.dead for layer in report.layers] == [0, 3]
    bounds = [verdict.bound for verdict in report.verdicts() if verdict.label == "dead"]
    assert bounds == [pytest.approx(1 - 0.05 ** (1 / 3))] * 3
    assert report.dead_percent == 50
    assert monitor.stop_reason is None
    monitor.finish()
