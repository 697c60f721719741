"""What the coverage page says of one network, as plain data: made by the run of the tests, or by the page's own.

Where ``NEURONSCOPE_NETWORK_ROWS`` names a folder, the tests leave a row there for each network that agreed, and
``scripts/coverage.py`` takes it from there: so CI runs each network once.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import neuronscope as ns
from tests.networks.agreement import Agreement
from tests.networks.zoo import Network

FOLDER = "NEURONSCOPE_NETWORK_ROWS"


@dataclass(frozen=True)
class Row:
    """One network.

    Attributes:
        family: The package it comes from.
        name: As it is shown.
        config: What its configuration says.
        agreement: What came of it: ``exact``, ``nothing measured``, or something worse.
        kinds: Sites by kind: ``module``, ``functional``, ``gated``.
        neurons: Of all sites.
        sources: Sites by what their neurons are known from: ``layer``, ``declared`` or ``assumed``.
        not_measured: Name → reason.
        ended_by: Place of each activation whose flow of units ended before it → the operator that ended it.
    """

    family: str
    name: str
    config: str
    agreement: str
    kinds: dict[str, int]
    neurons: int
    sources: dict[str, int]
    not_measured: dict[str, str]
    ended_by: dict[str, str] = field(default_factory=dict)

    @property
    def sites(self) -> int:
        """How many sites were measured."""
        return sum(self.kinds.values())


def row_of(network: Network, result: Agreement, agreement: str = "") -> Row:
    """The row of a network that was run; without a word on its agreement, it agreed."""
    sources = (tally.axis_source.partition(" ")[0] for tally in result.census.values())
    return Row(
        family=network.family,
        name=network.name,
        config=network.config,
        agreement=agreement or ("exact" if result.census else "nothing measured"),
        kinds=dict(Counter(_kind(tally) for tally in result.census.values())),
        neurons=sum(tally.neurons for tally in result.census.values()),
        sources=dict(Counter(sources)),
        not_measured=result.not_measured,
        ended_by=result.ended_by,
    )


def leave(row: Row) -> None:
    """Put a row where the page's script looks for it, if there is such a place."""
    if os.environ.get(FOLDER):
        _place(row.family, row.name).write_text(json.dumps(asdict(row)), encoding="utf-8")


def left(network: Network) -> Row | None:
    """The row that the tests left of a network."""
    if not os.environ.get(FOLDER) or not _place(network.family, network.name).exists():
        return None
    return Row(**json.loads(_place(network.family, network.name).read_text(encoding="utf-8")))


def _place(family: str, name: str) -> Path:
    return Path(os.environ[FOLDER]) / f"{family}-{re.sub(r'[^A-Za-z0-9_]+', '-', name)}.json"


def _kind(tally: ns.Tally) -> str:
    return "gated" if tally.kind == "gated" else "functional" if tally.info.place.endswith("()") else "module"
