"""Write docs/coverage.md: every network and every set-up that Neuronscope is tried on, and what came of it.

``python scripts/coverage.py [--check]``; with ``--check`` nothing is written, and the exit code is 1 when the page is
out of date. The networks are run, as ``tests/networks`` runs them; a network that disagrees is exit code 1 too.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from tests.networks.agreement import Agreement
    from tests.networks.zoo import Network

PAGE = ROOT / "docs" / "coverage.md"
FAMILIES = {"torchvision": "torchvision", "timm": "timm", "transformers": "Hugging Face transformers"}
INTRODUCTION = """\
# What Neuronscope is tried on

<!-- Written by scripts/coverage.py; with --check it says whether this is out of date. Do not edit. -->

## Networks

Every network below is built small, or as it is, with random weights, and trained for two steps, backward pass included:
once watched, with no word about where its neurons lie, and once counted by a slow twin that shares no code with
Neuronscope, keeps every activation and every gradient, and counts with numpy (`tests/networks/`). A network is in
**exact** agreement when

- the sites are the same, with the same names, in the same order;
- all integers are equal: zero outputs, zero gradients, values that are not finite, last active step, positions and
  examples;
- the neuron axis is what the network's row in the test says, was found from the layer that made the pre-activation and
  not assumed, and the number of neurons fits what autograd's graph says of that layer;
- weights, buffers and gradients are bit for bit those of the run without Neuronscope.

`modules`, `functional` and `gated` are kinds of site: activation modules (one for each call), activations called as
functions, and gated products such as SwiGLU's. *Axis known from* names the layers that tell where the neurons lie, with
the number of sites of each.
"""
SETUPS_INTRODUCTION = """\
## Set-ups

The ways in which people train, each a test that `make test` runs; this page lists them and does not run them. The first
{count} are rows of one table, `tests/core/setups.py`: after the run the census is the slow twin's (`test_setups.py`),
and weights and random numbers are bit for bit those of the run that nobody watched (`test_no_harm.py`).
"""
TESTS = {
    "Other set-ups": "tests/core/test_setups.py",
    "Compiled": "tests/core/test_compile.py",
    "Several processes": "tests/ranks/test_two_ranks.py",
    "Encoders with padding": "tests/core/test_padded_encoder.py",
    "Training frameworks": "tests/callbacks/test_runs.py",
    "Resuming": "tests/callbacks/test_resume.py",
    "What breaks other tools": "tests/core/test_peers_table.py",
    "Random networks": "tests/core/test_property_networks.py",
}
DISAGREES = "**disagrees**"
TABLED = ("test_census_is_the_twins",)


def main() -> int:
    """Write or check the page; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when the page is out of date")
    check = parser.parse_args().check
    from tests.conftest import _reach_networks

    _reach_networks()
    missing = [family for family in FAMILIES if _version(family) is None]
    if missing:
        print(f"Not installed: {', '.join(missing)}. `make test` installs them.", file=sys.stderr)
        return 2
    disagreements: list[str] = []
    page = "\n".join([INTRODUCTION, *_networks(disagreements), *_setups()]) + "\n"
    for line in disagreements:
        print(line, file=sys.stderr)
    if not check:
        PAGE.write_text(page, encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")
        return 1 if disagreements else 0
    before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    sys.stdout.writelines(
        difflib.unified_diff(before.splitlines(True), page.splitlines(True), "as it is", "as it is to be")
    )
    print(f"{PAGE.relative_to(ROOT)} is {'up to date' if page == before else 'out of date: run scripts/coverage.py'}")
    return 1 if disagreements or page != before else 0


def _version(package: str) -> str | None:
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def _networks(disagreements: list[str]) -> Iterator[str]:
    from tests.networks.agreement import NETWORKS, assert_agreement, run

    results = []
    for network in NETWORKS:
        print(f"{network.family} {network.name}", file=sys.stderr, flush=True)
        result = run(network)
        try:
            assert_agreement(network, result)
            results.append((network, result, "exact" if result.census else "nothing measured"))
        except AssertionError as error:
            disagreements.append(f"{network.family} {network.name}: {error}")
            results.append((network, result, DISAGREES))
    sites = sum(len(result.census) for _, result, _ in results)
    neurons = sum(tally.neurons for _, result, _ in results for tally in result.census.values())
    said = Counter(agreement for _, _, agreement in results)
    versions = ", ".join(f"{package} {_version(package)}" for package in ("torch", *FAMILIES))
    yield (
        f"**{said['exact']} of {len(results)} networks are in exact agreement: {sites:,} sites, {neurons:,} neurons.** "
        f"In {said['nothing measured']} others no activation can be measured, and Neuronscope says so; "
        f"{said[DISAGREES]} disagree. With {versions}.\n"
    )
    for family, title in FAMILIES.items():
        yield from _family(title, [entry for entry in results if entry[0].family == family])


def _family(title: str, results: list[tuple[Network, Agreement, str]]) -> Iterator[str]:
    yield f"### {title}\n"
    yield "| Network | Modules | Functional | Gated | Neurons | Axis known from | Agreement | Not measured |"
    yield "| --- | ---: | ---: | ---: | ---: | --- | --- | ---: |"
    for network, result, agreement in results:
        kinds = Counter(_kind(name) for name in result.census)
        neurons = sum(tally.neurons for tally in result.census.values())
        sources = Counter(
            tally.axis_source.removeprefix("producer (").removesuffix(")") for tally in result.census.values()
        )
        known = ", ".join(f"{source} {count}" for source, count in sorted(sources.items()))
        yield (
            f"| {network.name} | {kinds['module']} | {kinds['functional']} | {kinds['gated']} | {neurons:,} "
            f"| {known or '–'} | {agreement} | {len(result.not_measured) or '–'} |"
        )
    yield ""
    hidden = [(network, result) for network, result, _ in results if result.not_measured]
    if hidden:
        yield "Not measured, and said so in every report of the network:\n"
        for network, result in hidden:
            for (pattern, reason), count in _grouped(result.not_measured).items():
                yield f"- {network.name}: `{pattern}` ({count}): {reason}"
        yield ""
    yield "<details><summary>Configurations</summary>\n"
    for network, _, _ in results:
        yield f"- {network.name}: {network.config}"
    yield "\n</details>\n"


def _kind(name: str) -> str:
    return "gated" if name.endswith(".gated") else "functional" if "()" in name else "module"


def _grouped(not_measured: dict[str, str]) -> Counter[tuple[str, str]]:
    """Sites that differ in numbers only, as one pattern."""
    return Counter((re.sub(r"\b\d+\b", "*", name), reason) for name, reason in not_measured.items())


def _setups() -> Iterator[str]:
    from tests.core.setups import SETUPS

    yield SETUPS_INTRODUCTION.format(count=len(SETUPS))
    yield "| Set-up | Test |"
    yield "| --- | --- |"
    for setup in SETUPS:
        yield f"| {setup.name} | `test_census_is_the_twins[{setup.name}]` |"
    yield ""
    for title, path in TESTS.items():
        yield f"### {title}\n"
        yield f"In `{path}`:\n"
        yield "| What | Test |"
        yield "| --- | --- |"
        for name in _tests(ROOT / path):
            yield f"| {name.removeprefix('test_').replace('_', ' ')} | `{name}` |"
        yield ""


def _tests(path: Path) -> Iterator[str]:
    """Names of the tests in a file, in its order."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and node.name not in TABLED:
            yield node.name


if __name__ == "__main__":
    sys.exit(main())
