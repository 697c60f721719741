"""The clock on a network that dies for a real reason, against exact counting; docs/optimizer-clock.md has the table."""

from __future__ import annotations

import numpy as np

import neuronscope as ns
from neuronscope.checkpoints.file.examine_file import examine_file
from neuronscope.demo.digits import load_digits
from scripts.dying_networks import CASES, as_checkpoint, train
from scripts.optimizer_clock import compare, score


def test_deaths_dated_from_adam_state_agree_with_a_run_that_was_recorded():
    """6 × 64 neurons, AdamW, a learning rate twenty times as high in epochs 6 and 7; every step watched and counted."""
    case, scopes = CASES[1], []

    def after_step(model, optimizer, truth):
        if not scopes:
            scopes.append(ns.watch(model, window_steps=45))
        else:
            scopes[0].step(truth.steps)

    model, optimizer, truth = train(case, 0, load_digits(), after_step)
    scopes[0].detach()
    checkpoint = as_checkpoint(model, optimizer, step=truth.steps)

    # Against the gradients that the rows of each layer got.
    got = score(compare(checkpoint, truth))
    assert got.silent > 50  # there is something to find
    assert got.found == got.silent  # no luck: whoever is silent for 100 steps has a bound of 100 or more
    assert got.never_found == got.never
    assert got.violations == 0
    assert got.false_alarms <= 0.15 * got.living  # docs/optimizer-clock.md: 6 %
    assert np.percentile(got.errors, 1) >= 0
    assert np.median(got.errors) <= 30  # docs/optimizer-clock.md: +9

    # Against the monitor, which saw the outputs: who fires no more is found, and nobody of them is called alive.
    evidence, abstentions = examine_file(checkpoint)
    assert abstentions == []
    dead = 0
    for number, site in enumerate(scopes[0].report().layers):
        last = np.maximum(site.last_active_step, 0)
        gone = set(np.flatnonzero(site.judgement.dead & (truth.steps - last > 120)))
        said = {claim: set() for claim in ("alive", "no gradient", "never trained")}
        for piece in evidence:
            if piece.layer == f"{2 * number}":
                said[piece.claim] |= set(piece.neurons)
        dead += len(gone)
        assert not gone & said["alive"]
        assert gone <= said["no gradient"] | said["never trained"]
    assert dead > 50


def test_deaths_under_sgd_with_weight_decay_agree_with_counted_gradients():
    """6 × 64 neurons, momentum .9, weight decay 5e-4, a learning rate five times as high in epochs 6 and 7."""
    (case,) = [case for case in CASES if case.label.startswith("MLP, SGD .9, 1e-2, decay")]
    model, optimizer, truth = train(case, 0, load_digits())
    checkpoint = as_checkpoint(model, optimizer, step=truth.steps)
    got = score(compare(checkpoint, truth), exact=False)
    assert got.silent > 10
    assert got.found == got.silent
    firm = living = 0
    for evidence in examine_file(checkpoint)[0]:
        last = truth.last[evidence.layer][evidence.neurons]
        if evidence.claim == "no gradient" and evidence.basis == "inferred":
            firm += len(last)
            living += int((truth.steps - last < 45).sum())
    assert firm >= got.silent
    assert living <= 0.03 * got.living  # docs/optimizer-clock.md: .6 % over all networks that were counted
