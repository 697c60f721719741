"""Write docs/coverage.md: every network and every set-up that Neuronscope is tried on, and what came of it.

``python scripts/coverage.py [--check]``; with ``--check`` nothing is written, and the exit code is 1 when the page is
out of date. A network that disagrees is exit code 1 too. The networks are run, as ``tests/networks`` runs them (a
minute and a half on one core), but for those of which the tests left a row (``tests/networks/rows.py``), as in CI.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from tests.networks.rows import Row
    from tests.networks.zoo import Network

PAGE = ROOT / "docs" / "coverage.md"
FAMILIES = {"torchvision": "torchvision", "timm": "timm", "transformers": "Hugging Face transformers"}
INTRODUCTION = """\
# What Neuronscope is tried on

<!-- Written by scripts/coverage.py; with --check it says whether this is out of date. Do not edit. -->

## Networks

Every network below is built small, or as it is, with random weights. It is trained for two steps,
backward pass included, on photographs or on English text as bytes (networks of sound: on noise):
once watched, without being told where its neurons are, and once counted by a slow twin. The twin
shares no code with Neuronscope, keeps every activation and every gradient, and counts with numpy
(`tests/networks/`). A network is in **exact** agreement when

- the sites are the same, with the same names, in the same order;
- all integers are equal: zero outputs, zero gradients, values that are not finite, last active
  step, positions and examples;
- the layer in a site's name is the one that autograd's graph says, its units are those that gradients
  sent back from the neurons reach, and no axis is assumed;
- weights, buffers and gradients are bit for bit those of the run without Neuronscope.

`Modules`, `Functional` and `Gated` are kinds of site: a layer whose activation is a module, one
whose activation is called as a function, and gated products such as SwiGLU's. *Known from* says
how many sites' neurons follow from a layer, were declared, or are assumed.
"""
OPERATORS = """\
## Operators

Neuronscope follows the units of a layer through every torch function that a forward calls; the rules
are a table, `neuronscope/attach/operators.py`. A function without a rule loses the units, and never
gives wrong ones. In the networks above and the clients below, these operators ended a flow before an
activation, which is then not measured, or no neuron:

{ends}

What `topk` picks by value is no unit (the scores of a router). A product of two layers' outputs is a score
(attention). Convolution weights that are standardised by `F.batch_norm` (NFNet) stay weights. Heads that were split
off keep exact units, also joined ones (`cat`, `view`, `split`: EfficientViT), and so do grouped
products, and products with weights that data picked: each expert of a mixture is a layer.
"""
CLIENTS_INTRODUCTION = """\
## Real clients

Networks as people write them, small and with random weights: those of torchvision and transformers,
and others written by hand as their package or paper has them (`tests/networks/clients.py`). Each is
trained for two steps with its own loss. What a person would name stands in the test by hand, worked
out from the configuration: every site's name, its neurons and its positions, what is an output,
what is not measured and what is no neuron (`tests/networks/test_clients.py`). Every axis is known
from a layer. For {direct} the zero outputs are counted
again by plain hooks on the layers themselves.
"""
COMPILED_INTRODUCTION = """\
## Compiled networks

The networks above under `torch.compile`, trained for two steps from the same seed three times:
compiled unwatched, compiled watched, and watched in eager mode. *Equal* means: weights, buffers and
gradients of the two compiled runs are the same bit for bit; the compiled run has the sites of the
eager one, with the same names, and all integers are equal; and a network that is one graph
unwatched is one graph watched. Sites that the compiled run lists as not measured are left out; a
network of which no site is left is not equal. All in float32 on the CPU.
`python -m tests.networks.compiled` tries them and keeps what came of it; a few run in CI
(`tests/networks/test_compiled_networks.py`). Where there is more than one graph, torch's reason
stands below. Torch's limit of recompilations is set so high that no run meets it. Behind the limit
torch runs a function uncompiled, with other last bits, and a watched run may meet it later
([limits.md](limits.md)).

**Of {networks} networks {tried} were tried: {whole} are one graph, of which {equal} are equal; of the
{parts} others {others} are.**
"""
PROGRAMS = """\
Random programs under `torch.compile` (`tests/compiled/test_compiled_programs.py`), each held to its
unwatched run, to eager mode and to the slow twin: **{programs:,} tried, {failed:,} failed**,
{sites:,} sites, {dates}. {again:,} of those that pass failed once, and were run again when that was mended. {breaks}
"""
SETUPS_INTRODUCTION = """\
## Set-ups

These are the ways in which people train, each a test that `make test` runs; this page lists them and
does not run them. The first {count} are rows of one table, `tests/agreement/setups.py`. Each trains for
20 steps, and two tests check it: after the run the counts equal the slow twin's (`test_setups.py`:
`test_the_counts_of_every_setup_equal_the_twins[…]`); and weights, buffers, gradients and random
numbers are bit for bit those of an unwatched run, and every hook table is what it was
(`test_no_harm.py`:
`test_a_watched_run_has_the_weights_and_random_numbers_of_an_unwatched_one[…]`).
"""
LIGHTNING_INTRODUCTION = """\
### Lightning's Trainer

These are rows of `tests/callbacks/networks.py`: the counts are those of the module's own record
(`test_counts.py`), and over 20 steps and more, weights, random numbers and hook tables are those of
the run without us (`test_no_harm.py`).
"""
TESTS = {
    "Other set-ups": "tests/agreement/test_setups.py",
    "Compiled": "tests/compiled/test_compile.py",
    "Compiled networks of others": "tests/networks/test_compiled_networks.py",
    "Compiled random programs": "tests/compiled/test_compiled_programs.py",
    "Compiled again and again": "tests/compiled/test_compile_limits.py",
    "Fused kernels of attention": "tests/attach/test_fused_calls.py",
    "Fused kernels in compiled graphs": "tests/compiled/test_fused_in_graphs.py",
    "Modules that look at their hooks": "tests/attach/test_hook_points.py",
    "Models that are scripted, traced, fused, copied": "tests/agreement/test_rebuilt_models.py",
    "Modes and tensor classes of users": "tests/attach/test_modes_of_users.py",
    "Several threads": "tests/attach/test_threads.py",
    "Gradients that come more than once": "tests/attach/test_gradient_passes.py",
    "Losses": "tests/attach/test_losses.py",
    "Memory of a long run": "tests/agreement/test_flat_memory.py",
    "Several processes": "tests/ranks/test_two_ranks.py",
    "DDP, FSDP2 and tensor parallelism": "tests/ranks/test_strategies.py",
    "Uneven, failing and elastic ranks": "tests/ranks/test_uneven.py",
    "Ranks that are late": "tests/ranks/test_late.py",
    "Ranks that are killed, raise or end early": "tests/ranks/test_endings.py",
    "Ranks that hold no copies of one network": "tests/ranks/test_no_copies.py",
    "Ranks beside a trainer's own collectives": "tests/ranks/test_own_group.py",
    "Lightning's strategies": "tests/ranks/test_lightning.py",
    "Training frameworks": "tests/callbacks/test_runs.py",
    "Training frameworks, unharmed": "tests/callbacks/test_no_harm.py",
    "Hugging Face": "tests/callbacks/test_transformers_counts.py",
    "Trainers × ranks × strategies": "tests/ranks/test_combinations.py",
    "Hugging Face and Accelerate on two ranks": "tests/ranks/test_two_ranks_of_trainers.py",
    "Resuming": "tests/callbacks/test_resume.py",
    "Resuming into a changed network": "tests/tally/test_changed_networks.py",
    "Damaged saved states": "tests/tally/test_damaged_states.py",
    "Killed and resumed under Hugging Face": "tests/callbacks/test_transformers_killed.py",
    "Bad input": "tests/agreement/test_scope_usage.py",
    "What breaks other tools": "tests/agreement/test_peers_table.py",
    "Activations × layouts": "tests/agreement/test_activations_table.py",
    "The neuron axis": "tests/attach/test_axis_shown.py",
    "Activation classes, and those of one's own": "tests/attach/test_registration.py",
    "Activation classes of transformers and timm": "tests/networks/test_activation_classes.py",
    "Weights in other places": "tests/networks/test_weights.py",
    "Layers behind activations of every spelling": "tests/attach/test_layers_accounted.py",
    "Exported graphs": "tests/attach/test_exported_graphs.py",
    "What is said not to be measured": "tests/attach/test_true_reasons.py",
    "Names in wrappers": "tests/attach/test_names_in_wrappers.py",
    "Which columns read a neuron": "tests/attach/test_reader_columns.py",
    "Activations of what is no tensor of real numbers": "tests/attach/test_strange_tensors.py",
    "Unusual programs": "tests/agreement/test_unusual_programs.py",
    "Counts made elsewhere": "tests/truth/test_truth.py",
    "Random networks": "tests/agreement/test_property_networks.py",
}
DISAGREES = "**disagrees**"
TABLED = (
    "test_the_counts_of_every_setup_equal_the_twins",
    "test_weights_and_random_numbers_are_those_of_an_unwatched_run",
)


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
    rows = _rows(disagreements)
    operators = OPERATORS.format(ends="\n".join(_ends(rows)))
    page = (
        _wrapped("\n".join([INTRODUCTION, *_networks(rows), operators, *_clients(), *_compiled(), *_setups()])) + "\n"
    )
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


def _wrapped(page: str) -> str:
    """Return a page whose lines, but for tables, have at most 100 columns where they can be broken."""
    lines = []
    for line in page.split("\n"):
        long = len(line) > 100 and not line.startswith(("|", "<"))
        indent = "  " * line.startswith("- ")
        lines += (
            textwrap.wrap(line, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
            if long
            else [line]
        )
    return "\n".join(lines)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def _rows(disagreements: list[str]) -> list[Row]:
    from tests.networks.agreement import NETWORKS

    return [_row(network, disagreements) for network in NETWORKS]


def _ends(rows: list[Row]) -> Iterator[str]:
    """Yield a line for each operator that ended a flow before an activation: in which networks and clients."""
    from tests.networks.test_clients import ENDED_BY

    found: dict[str, dict[str, None]] = {}
    for name, operators in [*((row.name, row.ended_by.values()) for row in rows), *ENDED_BY.items()]:
        for operator in operators:
            found.setdefault(operator, {})[name] = None
    for operator, names in sorted(found.items()):
        yield f"- `{operator}`: {', '.join(names)}"


def _networks(rows: list[Row]) -> Iterator[str]:
    said = Counter(row.agreement for row in rows)
    sites, neurons = sum(row.sites for row in rows), sum(row.neurons for row in rows)
    versions = ", ".join(f"{package} {_version(package)}" for package in ("torch", *FAMILIES))
    yield (
        f"**{said['exact']} of {len(rows)} networks are in exact agreement: {sites:,} sites, {neurons:,} neurons.** "
        f"In {said['nothing measured']} others no activation can be measured, and Neuronscope says so; "
        f"{said[DISAGREES]} disagree. With {versions}.\n"
    )
    for family, title in FAMILIES.items():
        yield from _family(title, [row for row in rows if row.family == family])


def _row(network: Network, disagreements: list[str]) -> Row:
    """What the tests left of a network, or what comes of it now."""
    from tests.networks.agreement import assert_agreement, run
    from tests.networks.rows import left, row_of

    row = left(network)
    if row is not None:
        return row
    print(f"{network.family} {network.name}", file=sys.stderr, flush=True)
    result = run(network)
    try:
        assert_agreement(network, result)
    except AssertionError as error:
        disagreements.append(f"{network.family} {network.name}: {error}")
        return row_of(network, result, DISAGREES)
    return row_of(network, result)


def _family(title: str, rows: list[Row]) -> Iterator[str]:
    yield f"### {title}\n"
    yield "| Network | Modules | Functional | Gated | Neurons | Known from | Agreement | Not measured |"
    yield "| --- | ---: | ---: | ---: | ---: | --- | --- | ---: |"
    for row in rows:
        modules, functional, gated = (row.kinds.get(kind, 0) for kind in ("module", "functional", "gated"))
        known = ", ".join(f"{source} {count}" for source, count in sorted(row.sources.items()))
        yield (
            f"| {row.name} | {modules} | {functional} | {gated} | {row.neurons:,} "
            f"| {known or '–'} | {row.agreement} | {len(row.not_measured) or '–'} |"
        )
    yield ""
    hidden = [row for row in rows if row.not_measured]
    if hidden:
        yield "Not measured, as every report of the network says:\n"
        for row in hidden:
            for (pattern, reason), count in _grouped(row.not_measured).items():
                yield f"- {row.name}: `{pattern}` ({count}): {reason}"
        yield ""
    yield "<details><summary>Configurations</summary>\n"
    for row in rows:
        yield f"- {row.name}: {row.config}"
    yield "\n</details>\n"


def _grouped(not_measured: dict[str, str]) -> Counter[tuple[str, str]]:
    """Sites that differ in numbers only, as one pattern."""
    return Counter((re.sub(r"\b\d+\b", "*", name), reason) for name, reason in not_measured.items())


def _clients() -> Iterator[str]:
    from tests.networks.test_clients import DIRECT, EXPECTED, FOUND, PACKAGES

    yield CLIENTS_INTRODUCTION.format(direct=", ".join(DIRECT))
    yield "| Client | Written by | Sites | Neurons of all sites | Outputs | Not measured | No neurons | What is found |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |"
    for name, expected in EXPECTED.items():
        neurons = sum(neurons for neurons, _ in expected.sites.values())
        counts = [len(expected.sites), neurons, len(expected.outputs), len(expected.not_measured)]
        cells = [f"{count:,}" if count else "–" for count in (*counts, len(expected.not_neurons))]
        yield f"| {name} | {PACKAGES.get(name, 'hand')} | {' | '.join(cells)} | {FOUND[name]} |"
    yield ""


def _compiled() -> Iterator[str]:
    """Yield the tables of what was tried compiled, from the files that those runs left."""
    from tests.compiled import test_compiled_programs as programs
    from tests.networks import compiled

    rows = compiled.kept()
    whole = {name for name, ways in rows.items() if compiled.REASON not in ways["aot_eager"]}
    equal = {name for name, ways in rows.items() if _outcome(ways["aot_eager"]) == "equal"}
    yield COMPILED_INTRODUCTION.format(
        networks=len(compiled.NETWORKS),
        tried=len(rows),
        whole=len(whole),
        equal=len(whole & equal),
        parts=len(rows) - len(whole),
        others=len(equal - whole),
    )
    yield "| Network | Graphs | Sites | `aot_eager` | Inductor | Tried |"
    yield "| --- | ---: | ---: | --- | --- | --- |"
    for name, ways in rows.items():
        row = ways["aot_eager"]
        cells = [_outcome(ways.get(backend)) for backend in ("aot_eager", "inductor")]
        yield f"| {name} | {_graphs(row)} | {row.get('sites', '–')} | {' | '.join(cells)} | {row['date']} |"
    yield ""
    yield from (f"- {name}: {ways['aot_eager'][compiled.REASON]}" for name, ways in rows.items() if name not in whole)
    yield ""
    parts = programs.kept().values()
    failed = {seed: way for part in parts for seed, way in part["failed"].items()}
    yield PROGRAMS.format(
        programs=sum(part["programs"] for part in parts),
        failed=len(failed),
        again=sum(len(part.get("again", ())) for part in parts),
        sites=sum(part["sites"] for part in parts),
        dates=" and ".join(sorted({part["date"] for part in parts})),
        breaks=f"Failed, by what is compiled: {_listed(failed)}." if failed else "",
    )


def _outcome(row: dict[str, Any] | None) -> str:
    """Return in a word or two what came of a compiled network."""
    if row is None:
        return "–"
    said = row.get("failed") or row.get("not compiled")
    if said:
        return f"{'failed' if 'failed' in row else 'torch cannot'}: {said.splitlines()[0]}"
    apart = {part: row[part] for part in ("weights", "counts") if row[part] != "equal"}
    return ", ".join(f"{part} {said}" for part, said in apart.items()) or "equal"


def _graphs(row: dict[str, Any]) -> str:
    unwatched, watched = row.get("graphs", ("–", "–"))
    return f"{unwatched}" if unwatched == watched else f"{unwatched} (watched {watched})"


def _listed(failed: dict[str, str]) -> str:
    ways = Counter(failed.values())
    return ", ".join(f"{way} ({count})" for way, count in ways.items())


def _setups() -> Iterator[str]:
    from tests.agreement.setups import SETUPS
    from tests.callbacks.networks import SETUPS as LIGHTNING

    yield SETUPS_INTRODUCTION.format(count=len(SETUPS))
    yield from (f"- {setup.name}" for setup in SETUPS)
    yield ""
    yield LIGHTNING_INTRODUCTION
    yield from (f"- {setup.name}" for setup in LIGHTNING)
    yield ""
    for title, path in TESTS.items():
        yield f"### {title}\n"
        yield f"In `{path}`:\n"
        yield from (f"- `{name}`" for name in _tests(ROOT / path))
        yield ""


def _tests(path: Path) -> Iterator[str]:
    """Names of the tests in a file, in its order."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and node.name not in TABLED:
            yield node.name


if __name__ == "__main__":
    sys.exit(main())
