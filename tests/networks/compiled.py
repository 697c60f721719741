"""Networks of others under ``torch.compile``: compiled unwatched, compiled watched, and eager watched.

``python -m tests.networks.compiled aot_eager [PATTERN…]`` tries the networks whose names match, or all that were not
tried yet, each in a process of its own, and keeps what came of them in ``compiled_runs.json``, with the date.
``docs/coverage.md`` shows that file.
"""

from __future__ import annotations

import datetime
import fnmatch
import json
import multiprocessing
import re
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

import neuronscope as ns
from tests.agreement.slow_twin import Nobody, Watched, assert_bits, state_of
from tests.compiled.test_compile import Counter, assert_same_census
from tests.networks.agreement import NETWORKS as COMPARED
from tests.networks.agreement import _quiet, _threads, train
from tests.networks.language import MAMBAS
from tests.networks.zoo import Network

NETWORKS = (*COMPARED, *MAMBAS)
RUNS = Path(__file__).with_name("compiled_runs.json")
EQUAL = "equal"
REASON = "not one graph"
LIMIT = 900  # seconds for a network
_ADDRESS = re.compile("0x[0-9a-f]+")  # of an object in the reason of a graph break
_EXPERT = re.compile(r"\.\d+(?=\(|/)")  # the number of an expert in the name of its site


class CannotCompile(Exception):
    """torch cannot compile the network as it is asked to, watched or not. The text is torch's reason."""


@dataclass(frozen=True)
class CompiledRuns:
    """What came of one network.

    Attributes:
        states: Weights, buffers and gradients of the compiled runs: unwatched, watched.
        graphs: How many graphs each of them had, and how many tensors these returned.
        compiled: Census of the compiled run.
        eager: Census of the same run in eager mode, without what is left out.
        left_out: Sites of the eager run that the compiled run's report lists as not measured: those of experts, where a
            graph cannot know which expert each row is of.
    """

    states: tuple[dict[str, Tensor], dict[str, Tensor]]
    graphs: tuple[tuple[int, int], tuple[int, int]]
    compiled: ns.Census
    eager: Mapping[str, ns.Tally]
    left_out: tuple[str, ...]


def run(network: Network, backend: str = "aot_eager", *, fullgraph: bool = True) -> CompiledRuns:
    """Train a network three times from the same seed: compiled unwatched, compiled watched, and eager watched.

    Torch runs a function that met its limit of recompilations uncompiled, and a watched run may meet it later, so that
    the two would be compared with each other's last bits: the limit is higher than any network needs.

    Args:
        network: Which.
        backend: What compiles its graphs.
        fullgraph: Whether it must be one graph.

    Raises:
        CannotCompile: torch cannot compile the unwatched network.
        AssertionError: The watching ended, or the one graph is another one watched, or graphs break for another reason.
    """
    states, graphs, breaks, censuses, listed = [], [], [], [], []
    with _threads(1), _quiet(bool(network.unseen)), torch._dynamo.config.patch(recompile_limit=64):
        for watcher, compiles in ((Nobody(), True), (Watched(), True), (Watched(), False)):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            torch.manual_seed(0)
            model, counter = network.build().train(), Counter(backend)
            with watcher.attach(model):
                if compiles:
                    model.compile(backend=counter, fullgraph=fullgraph)
                try:
                    train(model, watcher, network)
                except torch._dynamo.exc.TorchDynamoException as error:
                    if isinstance(watcher, Watched):
                        raise
                    raise CannotCompile(_first_line(error)) from error
            states.append(state_of(model))
            graphs.append((counter.graphs, counter.outputs))
            breaks.append({_ADDRESS.sub("", reason) for reason in torch._dynamo.utils.counters["graph_break"]})
            if isinstance(watcher, Watched):
                assert watcher.scope._hooks.failure is None
                censuses.append(watcher.scope.census("train"))
                listed.append({each.name for each in watcher.scope.report().not_measured})
    assert breaks[1] <= breaks[0], f"only the watched graphs break because of {breaks[1] - breaks[0]}"
    if fullgraph:
        assert graphs[0] == graphs[1], f"{graphs[0]} graphs and outputs unwatched, {graphs[1]} watched"
    compiled, eager = censuses
    left_out = tuple([site for site in eager if _EXPERT.sub("", site) in listed[0]])
    eager = {site: tally for site, tally in eager.items() if site not in left_out}
    return CompiledRuns((states[0], states[1]), (graphs[0], graphs[1]), compiled, eager, left_out)


def describe(network: Network, backend: str) -> dict[str, Any]:
    """Return what came of a network as plain data; one that torch cannot make one graph of is compiled in parts.

    Args:
        network: Which.
        backend: What compiles its graphs.
    """
    row: dict[str, Any] = {}
    began = time.monotonic()
    try:
        try:
            runs = run(network, backend)
        except CannotCompile as reason:
            row[REASON] = str(reason)
            runs = run(network, backend, fullgraph=False)
    except CannotCompile as reason:
        return {**row, "not compiled": str(reason)}
    except Exception as error:  # noqa: BLE001, it is shown
        return {**row, "failed": f"{type(error).__name__}: {_first_line(error)}"}
    (unwatched, _), (watched, _) = runs.graphs
    row |= {"graphs": [unwatched, watched], "weights": _weights(*runs.states), "counts": _counts(runs)}
    if runs.left_out:
        row["left out"] = len(runs.left_out)
    return {**row, "sites": len(runs.eager), "seconds": round(time.monotonic() - began)}


def _first_line(error: Exception) -> str:
    """Return the first line of what an error says; of an error of a back end, that of its cause."""
    return str(getattr(error, "inner_exception", error)).partition("\n")[0]


def _weights(unwatched: dict[str, Tensor], watched: dict[str, Tensor]) -> str:
    try:
        assert_bits(unwatched, watched)
    except AssertionError:
        apart = (unwatched[name].double() - watched[name].double() for name in unwatched)
        return f"{max(float(each.abs().max()) for each in apart if each.numel()):.1e} apart"
    return EQUAL


def _counts(runs: CompiledRuns) -> str:
    if not runs.eager:
        return "no site compared"
    try:
        assert_same_census(runs.compiled, runs.eager)
    except AssertionError as error:
        if [*runs.compiled] != [*runs.eager]:
            return f"other sites: {sorted({*runs.compiled} ^ {*runs.eager})[:4]}"
        pairs = [(runs.compiled[name], tally) for name, tally in runs.eager.items()]
        if any(compiled.positions != eager.positions for compiled, eager in pairs):
            return f"other positions: {error}"
        apart = sum(int((one.zero_outputs - two.zero_outputs).abs().sum()) for one, two in pairs)
        apart += sum(int((one.zero_gradients - two.zero_gradients).abs().sum()) for one, two in pairs)
        of = sum(2 * eager.positions * eager.neurons for _, eager in pairs)
        return f"{apart:,} of {of:,} apart" if apart else f"apart: {error}"
    return EQUAL


def _send(connection: Connection, network: Network, backend: str) -> None:
    connection.send(describe(network, backend))


def _in_a_process(network: Network, backend: str) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")  # torch and the packages are imported once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, network, backend))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(LIMIT) else {"failed": f"more than {LIMIT} s"}
    except EOFError:
        return {"failed": "the process ended"}
    finally:
        process.kill()
        process.join()


def kept() -> dict[str, dict[str, dict[str, Any]]]:
    """Return what came of the networks that were tried: network → back end → row; networks as in the tables."""
    rows = json.loads(RUNS.read_text(encoding="utf-8")) if RUNS.exists() else {}
    return {network.name: rows[network.name] for network in NETWORKS if network.name in rows}


def main(backend: str, *patterns: str) -> int:
    """Try networks, keep what came of each, and return how many are not equal.

    Args:
        backend: What compiles the graphs.
        patterns: Of the networks' names; all that were not tried yet if there is none.
    """
    from tests.conftest import _reach_networks

    _reach_networks()
    warnings.simplefilter("ignore")
    apart = 0
    for network in NETWORKS:
        named = any(fnmatch.fnmatchcase(network.name, pattern) for pattern in patterns)
        if not named and (patterns or backend in kept().get(network.name, {})):
            continue
        row = {"date": datetime.date.today().isoformat(), **_in_a_process(network, backend)}
        rows = kept()
        rows.setdefault(network.name, {})[backend] = row
        RUNS.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        apart += (row.get("weights"), row.get("counts"), row.get("failed")) != (EQUAL, EQUAL, None)
        print(network.name, row, flush=True)
    return apart


if __name__ == "__main__":
    sys.exit(min(main(*sys.argv[1:]), 1))
