"""Count the neurons of several sites, each once, in the report's window and in every window of the history."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from neuronscope.arrays import BoolArray, ByteArray, IntArray
from neuronscope.judge.distinct import DistinctNeurons
from neuronscope.judge.verdicts import LABELS

if TYPE_CHECKING:
    from neuronscope.report.report import SiteReport

__all__ = ["NeuronCounts", "Totals"]


class NeuronCounts:
    """Counts neurons by what is known of them: those of a site, or those in a report's totals."""

    def count(self, mask: Callable[[SiteReport], BoolArray]) -> int:
        """Return the number of neurons for which a mask of a site, bool ``(N,)``, is true."""
        raise NotImplementedError

    @property
    def dead(self) -> int:
        """Number of dead neurons."""
        return self.count(lambda site: site.judgement.dead)

    @property
    def born_dead(self) -> int:
        """Number of dead neurons that never fired since watching began."""
        return self.count(lambda site: site.judgement.dead & (site.last_active_step < 0))

    @property
    def died(self) -> int:
        """Number of dead neurons that worked and then died."""
        return self.dead - self.born_dead

    @property
    def silent(self) -> int:
        """Number of silent neurons: zero output at every position, but gradient arrives."""
        return self.count(lambda site: site.judgement.silent)

    @property
    def dormant(self) -> int:
        """Number of dormant neurons: almost no output, and neither dead, silent nor cut off."""
        return self.count(lambda site: site.judgement.dormant)

    @property
    def tau_dormant(self) -> int:
        """Number of τ-dormant neurons, as Sokar et al. 2023 count them: dead and silent ones included."""
        return self.count(lambda site: site.judgement.tau_dormant)

    @property
    def cut_off(self) -> int:
        """Number of neurons that fire but get no gradient at any position."""
        return self.count(lambda site: site.judgement.cut_off)

    @property
    def linear(self) -> int:
        """Number of piecewise-linear neurons that were never off."""
        return self.count(lambda site: site.judgement.linear)

    @property
    def not_finite_neurons(self) -> int:
        """Number of neurons that gave NaN or infinity."""
        return self.count(lambda site: site.judgement.not_finite)

    @property
    def unseen(self) -> int:
        """Number of neurons that were not observed in the window."""
        return self.count(lambda site: site.judgement.unseen)

    @property
    def observed_neurons(self) -> int:
        """Number of neurons that were observed at least once in the window."""
        return self.count(lambda site: ~site.judgement.unseen)

    @property
    def judged_neurons(self) -> int:
        """Number of neurons that were observed in the window and gave only finite outputs."""
        return self.count(lambda site: ~(site.judgement.unseen | site.judgement.not_finite))

    @property
    def dead_percent(self) -> float:
        """Dead neurons in percent of the judged ones; NaN if none was judged, since a network of NaN is not healthy."""
        return self._percent(self.dead)

    @property
    def silent_percent(self) -> float:
        """Silent neurons in percent of the judged ones; NaN if none was judged."""
        return self._percent(self.silent)

    @property
    def dormant_percent(self) -> float:
        """Dormant neurons in percent of the judged ones; NaN if none was judged."""
        return self._percent(self.dormant)

    @property
    def tau_dormant_percent(self) -> float:
        """τ-dormant neurons (Sokar et al. 2023) in percent of the judged ones; NaN if none was judged."""
        return self._percent(self.tau_dormant)

    def _percent(self, number: int) -> float:
        judged = self.judged_neurons
        return 100.0 * number / judged if judged else float("nan")


class Totals(NeuronCounts):
    """Count the neurons of several sites: each unit of a layer once, without assumed axes and without outputs.

    Attributes:
        stand_ins: Which neurons of each site stand for a neuron, one mask by site, bool ``(N,)``; see
            :meth:`neuronscope.judge.distinct.DistinctNeurons.stand_ins`.
    """

    def __init__(self, sites: Sequence[SiteReport]) -> None:
        self.sites = tuple(sites)
        self._distinct = DistinctNeurons(self.sites)
        self._labels = [site.judgement.labels() for site in self.sites]
        self.stand_ins = self._distinct.stand_ins(self._labels)
        self.neurons = self.count(lambda site: np.ones(site.neurons, dtype=np.bool_))

    @cached_property
    def shared(self) -> bool:
        """Whether some neuron is at several places, so that the sites' own numbers do not add up to the totals."""
        return self.neurons < sum(site.neurons for site in self.sites if site.in_headlines)

    def count(self, mask: Callable[[SiteReport], BoolArray]) -> int:
        """Return the number of neurons for which a mask of a site, bool ``(N,)``, is true."""
        return sum(
            int((mask(site) & stands_in).sum())
            for site, stands_in in zip(self.sites, self.stand_ins, strict=True)
            if site.in_headlines
        )

    @cached_property
    def by_site(self) -> IntArray:
        """Number of neurons by site, in the order of :attr:`sites`, and by label, in that of ``LABELS``, int64 (S, L).

        Each neuron is counted at the place that stands for it, so that columns add up to the totals.
        """
        counts = np.zeros((len(self.sites), len(LABELS)), dtype=np.int64)
        for row, site, labels, stands_in in zip(counts, self.sites, self._labels, self.stand_ins, strict=True):
            if site.in_headlines:
                row += np.bincount(labels[stands_in], minlength=len(LABELS))
        return counts

    def label_counts(self) -> dict[str, int]:
        """Return the number of neurons by label, in the order of :data:`neuronscope.judge.verdicts.LABELS`."""
        return dict(zip(LABELS, self.by_site.sum(axis=0).tolist(), strict=True))

    def deaths(self) -> int:
        """Return how often neurons died since watching began. It never falls while a run goes on.

        A neuron that revived and died again counts again. The deaths of one at several places are those of its gate's
        product, else of the place where it died most often.
        """
        return int(self._distinct.highest([site.history.deaths for site in self.sites]).sum())

    def sites_with(self, mask: Callable[[SiteReport], BoolArray]) -> list[SiteReport]:
        """Return the sites at which neurons are counted for which a mask is true. A gate of a product is not one."""
        return [
            site
            for site, stands_in in zip(self.sites, self.stand_ins, strict=True)
            if site.in_headlines and (mask(site) & stands_in).any()
        ]

    def at_home(self, values: Sequence[IntArray]) -> Iterator[tuple[SiteReport, IntArray]]:
        """Yield each site with the values of the neurons that are counted there, int64 ``(M,)``, given those by site.

        A neuron's site is the product of its gate, else its first site. It does not depend on its label, so that a
        site's share of dead neurons means something. The value at the place that stands for a neuron counts. A site
        with no such neurons is left out.
        """
        spread = self._distinct.spread(values, self.stand_ins)
        for site, value, home in zip(self.sites, spread, self._distinct.homes(), strict=True):
            if site.in_headlines and home.any():
                yield site, value[home]

    def steps(self) -> IntArray:
        """Return the last step of each window of the history, int64 ``(W,)``, ascending."""
        steps = [site.history.steps for site in self.sites if site.in_headlines]
        return np.unique(np.concatenate(steps)) if steps else np.zeros(0, dtype=np.int64)

    def labels_at(self, step: int) -> ByteArray:
        """Return the label of each neuron in the window of the history that ends at a step, uint8 ``(D,)``.

        They are indices into :data:`neuronscope.judge.verdicts.LABELS`, in the same order for every window. A neuron
        that was never off counts as alive here.
        """
        labels = []
        for site in self.sites:
            window = int(np.searchsorted(site.history.steps, step))
            if window < len(site.history.steps) and site.history.steps[window] == step:
                labels.append(site.history.labels(window))
            else:
                labels.append(np.full(site.neurons, LABELS.index("unseen"), dtype=np.uint8))
        return self._distinct.label(labels)
