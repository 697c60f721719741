"""Random programs under ``torch.compile``: one graph, the weights of the unwatched run, and the counts of eager.

A seed draws a small program: layers, a layer that is called again and again, norms, activations (as modules, shared, as
functions, in place), gates of two layers and of the parts of one (chunk, split, tensor_split, unbind), top-k, sorting,
joined parts, residual sums, a part without gradients, loops, masks, dropout; and what is compiled of it: the whole, the
whole with a break in its middle, or a part, wrapped or in place. It is trained for three steps, with a forward for
validation, five times: compiled and unwatched, compiled and watched, eager and unwatched, eager and watched, and
counted slowly.

``python -m tests.compiled.test_compiled_programs 20 1000`` runs the seeds from 20 to 999, tells which ones fail, and
keeps that in ``compiled_programs.json``, with the date; without seeds, it runs those again that failed, and keeps that
too. ``docs/coverage.md`` shows that file.
"""

from __future__ import annotations

import datetime
import gc
import json
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

from tests.agreement.slow_twin import Nobody, Twin, Watched, assert_bits, assert_same, hook_tables, state_of
from tests.agreement.test_property_networks import FUNCTIONS, IN_PLACE, MODULES
from tests.compiled.compiler_marks import COMPILES
from tests.compiled.test_compile import Counter, assert_same_census, train

pytestmark = COMPILES

RUNS = Path(__file__).with_name("compiled_programs.json")
WIDTH = 6
SHAPE = (4, 3, WIDTH)  # batch, time, features: neurons lie on the last dimension

Act = Callable[[Tensor], Tensor]


def halves(gate: Tensor, up: Tensor, act: Act) -> Tensor:
    return act(gate) * up


#: How a gate and its partner come out of one tensor of twice the width.
PARTS: dict[str, Callable[[Tensor], Any]] = {
    "chunk": lambda x: x.chunk(2, -1),
    "torch.chunk": lambda x: torch.chunk(x, 2, dim=-1),
    "split": lambda x: x.split(WIDTH, -1),
    "split by sizes": lambda x: torch.split(x, [WIDTH, WIDTH], -1),
    "tensor_split": lambda x: torch.tensor_split(x, 2, -1),
    "unbind": lambda x: x.unflatten(-1, (2, WIDTH)).unbind(-2),
    "slices": lambda x: (x[..., :WIDTH], x[..., WIDTH:]),
}

#: Operations that need a layer of their own, by its width.
OWN = {"layer": WIDTH, "gated": WIDTH, "gated by a module": WIDTH, "parts": 2 * WIDTH, "top-k": 2 * WIDTH}
OWN |= {"sort": WIDTH, "max over time": WIDTH, "without gradients": WIDTH, "loop": WIDTH, "joined": WIDTH}
SIMPLE = ("norm", "module", "shared", "function", "in place", "residual", "same layer", "drop", "mask", "scale", "view")
OPERATIONS = (*OWN, *SIMPLE)


class Step(nn.Module):
    """One operation, as a module of its own."""

    def __init__(self, kind: str, act: str, part: str) -> None:
        super().__init__()
        self.kind, self.act, self.function = kind, act, FUNCTIONS[act]
        self.part = PARTS[part]
        if kind in OWN:
            self.layer = nn.Linear(WIDTH, OWN[kind])
        if kind in ("gated", "gated by a module", "joined", "top-k"):
            self.up = nn.Linear(WIDTH, WIDTH)
        if kind in ("module", "gated by a module"):
            self.module = MODULES[act]()
        if kind == "norm":
            self.norm = nn.LayerNorm(WIDTH)
        if kind == "drop":
            self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, "_" + self.kind.replace(" ", "_").replace("-", "_"))(x)

    def _layer(self, x: Tensor) -> Tensor:
        return self.layer(x)

    def _gated(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x)) * self.up(x)

    def _gated_by_a_module(self, x: Tensor) -> Tensor:
        return self.up(x) * self.module(self.layer(x))

    def _parts(self, x: Tensor) -> Tensor:
        gate, up = self.part(self.layer(x))
        return self.function(gate) * up

    def _top_k(self, x: Tensor) -> Tensor:
        return self.up(self.layer(x).topk(WIDTH, -1).values)

    def _sort(self, x: Tensor) -> Tensor:
        return self.layer(torch.sort(x, 1)[0])

    def _max_over_time(self, x: Tensor) -> Tensor:
        return self.layer(x) + x.max(1, keepdim=True)[0]

    def _without_gradients(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            side = self.function(self.layer(x))
        return x + side

    def _loop(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.function(self.layer(x))
        return x

    def _joined(self, x: Tensor) -> Tensor:
        left, right = self.layer(x), self.function(self.up(x))
        return torch.cat([left[:, :1], right[:, 1:]], 1)

    def _norm(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def _module(self, x: Tensor) -> Tensor:
        return self.module(x)

    def _function(self, x: Tensor) -> Tensor:
        return self.function(x)

    def _in_place(self, x: Tensor) -> Tensor:
        return self.function(x * 0.9, inplace=True) if self.act in IN_PLACE else self.function((x * 0.9).mul_(1.1))

    def _drop(self, x: Tensor) -> Tensor:
        return self.drop(x)

    def _mask(self, x: Tensor) -> Tensor:
        return x.masked_fill(torch.ones(1, x.shape[1], 1).cumsum(1) > 2, 0.5)

    def _scale(self, x: Tensor) -> Tensor:
        return x * 1.5 - 0.1

    def _view(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], 2, WIDTH // 2).transpose(1, 2).transpose(1, 2).flatten(-2)


class Segment(nn.Module):
    """Runs operations one after another."""

    def __init__(
        self, operations: list[tuple[str, str, str]], same: nn.Module, shared: nn.Module, breaks: bool
    ) -> None:
        super().__init__()
        self.kinds = [kind for kind, _, _ in operations]
        self.steps = nn.ModuleList(Step(*operation) for operation in operations)
        self.same, self.shared, self.breaks = same, shared, breaks

    def forward(self, x: Tensor) -> Tensor:
        kept = x
        for number, (kind, step) in enumerate(zip(self.kinds, self.steps)):
            if self.breaks and number == len(self.kinds) // 2:
                torch._dynamo.graph_break()
                x = kept = x * 1.0  # of a tensor that is used on both sides of a break no gradient is counted
            if kind == "residual":
                x = kept = x + kept
            elif kind == "same layer":
                x = self.same(x)
            elif kind == "shared":
                x = self.shared(x + 0.1)
            else:
                x = step(x)
        return x


class Program(nn.Module):
    """A program of one seed: three segments, of which the middle one may be compiled alone."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        self.way = draw.choice(["whole", "whole", "whole", "breaks", "part", "part in place"])
        act = draw.choice(IN_PLACE)
        self.first, self.same = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.shared = MODULES[act](**({"inplace": True} if draw.random() < 0.5 else {}))
        self.segments = nn.ModuleList()
        for place in range(3):
            operations = [
                (draw.choice(OPERATIONS), draw.choice(sorted(MODULES)), draw.choice(sorted(PARTS)))
                for _ in range(draw.randint(1, 3))
            ]
            breaks = self.way == "breaks" and place == 1
            self.segments.append(Segment(operations, self.same, self.shared, breaks))
        self.kinds = [kind for segment in self.segments for kind in segment.kinds]
        self.last = nn.Linear(WIDTH, 2)

    def sites_before_joining(self) -> set[str]:
        """Return the sites to which rows may be added that are joined with another layer's before they go on."""
        steps = {name: step for name, step in self.named_modules() if isinstance(step, Step)}
        return {f"{name}.up/{step.act}" for name, step in steps.items() if step.kind == "joined"}

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for segment in self.segments:
            x = segment(x * 1.0)
        return self.last(x)


def compiled(model: Program, backend: Counter) -> Callable[[Tensor], Tensor]:
    if model.way == "part":
        model.segments[1] = torch.compile(model.segments[1], backend=backend, fullgraph=True)
    elif model.way == "part in place":
        model.segments[1].compile(backend=backend, fullgraph=True)
    else:
        return torch.compile(model, backend=backend, fullgraph=model.way == "whole")
    return model


def check(seed: int) -> int:
    """Assert all that must hold of the program of a seed, and return the number of its sites."""
    states, backends, scopes, drawn = [], [], [], []
    twin = Twin({None: 2})
    for watcher, compiles in (
        (Nobody(), True),
        (Watched(), True),
        (Nobody(), False),
        (Watched(), False),
        (twin, False),
    ):
        torch._dynamo.reset()
        torch.manual_seed(seed)
        model, backend = Program(seed), Counter("aot_eager")
        run = compiled(model, backend) if compiles else model
        before = hook_tables(model)
        with watcher.attach(model):
            train(model, run, watcher, SHAPE, 3)
            model.eval()
            with watcher.phase("val"), torch.no_grad():
                run(torch.linspace(-2, 2, 2 * 3 * WIDTH).view(2, 3, WIDTH))
        if watcher is not twin:
            assert hook_tables(model) == before
        states.append(state_of(model))
        drawn.append(torch.get_rng_state())
        backends.append(backend)
        scopes.append(getattr(watcher, "scope", None))
    assert torch.overrides._len_torch_function_stack() == 0
    assert scopes[1]._hooks.failure is scopes[3]._hooks.failure is None
    for watched, unwatched in ((1, 0), (3, 2)):
        assert_bits(states[watched], states[unwatched])
        assert drawn[watched].equal(drawn[unwatched])
    if model.way != "breaks":  # torch compiles some containers only if they have hooks
        assert (backends[1].graphs, backends[1].outputs) == (backends[0].graphs, backends[0].outputs)
    listed, in_eager = ({each.name: each.reason for each in scopes[run].report().not_measured} for run in (1, 3))
    for phase in ("train", "val"):
        eager, graph = scopes[3].census(phase), scopes[1].census(phase)
        if "without gradients" not in model.kinds:  # the twin finds layers in autograd's graph
            truth = twin.tallies(phase)
            if "joined" in model.kinds:  # nor does it tell rows of two layers apart; test_experts.py counts such rows
                truth = {site: counts for site, counts in truth.items() if site not in model.sites_before_joining()}
                eager_alone = {site: tally for site, tally in eager.items() if site in truth}
            else:
                eager_alone = eager
            assert_same(eager_alone, truth)
        # Rows of two layers in one tensor are told apart in eager mode only, and listed if they are compiled.
        several_layers = "joined" in model.kinds and listed.keys() > in_eager.keys()
        in_graphs = {site: tally for site, tally in eager.items() if site in graph or not several_layers}
        assert_same_census(graph, in_graphs)
        for name, tally in in_graphs.items():
            assert graph[name].info == tally.info, name
    assert {name: listed.get(name) for name in in_eager} == in_eager
    assert in_eager == listed or "joined" in model.kinds
    assert scopes[1].not_neurons() == scopes[3].not_neurons()
    return len(scopes[1].census())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", range(20))
def test_a_random_program_counts_the_same_compiled_and_keeps_the_weights_of_its_unwatched_run(seed):
    check(seed)


def kept() -> dict[str, dict[str, Any]]:
    """Return what came of the programs that were tried, by their first and last seeds."""
    return json.loads(RUNS.read_text(encoding="utf-8")) if RUNS.exists() else {}


def run(seeds: Iterable[int]) -> tuple[int, dict[int, str]]:
    """Check the programs of some seeds; return the number of sites, and what was compiled of each that failed."""
    failed: dict[int, str] = {}
    began, sites = time.monotonic(), 0
    for seed in seeds:
        try:
            sites += check(seed)
        except Exception as error:  # noqa: BLE001
            last = traceback.extract_tb(error.__traceback__)[-1]
            failed[seed] = Program(seed).way
            why = f"{type(error).__name__} at {last.name}:{last.lineno}: {str(error)[:300]!r}"
            print(f"{seed} ({failed[seed]}): {why}", flush=True)
        print(f"up to {seed}: {len(failed)} failed, {sites} sites, {time.monotonic() - began:.0f} s", flush=True)
    return sites, failed


def keep(rows: dict[str, dict[str, Any]]) -> None:
    """Keep what came of programs, by their first and last seeds, beside what is kept already."""
    RUNS.write_text(json.dumps({**kept(), **rows}, indent=1) + "\n", encoding="utf-8")


def main(*given: str) -> int:
    """Run the seeds from the first number to before the second, or those again that failed; return how many fail."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # as conftest.py does
    today = datetime.date.today().isoformat()
    if given:
        first, stop = map(int, given)
        sites, failed = run(range(first, stop))
        keep({f"{first}-{stop - 1}": {"date": today, "programs": stop - first, "sites": sites, "failed": failed}})
        return len(failed)
    for name, row in kept().items():
        for seed in [*row["failed"]]:
            _, failed = run([int(seed)])
            if not failed:  # `again`: which of the seeds failed once
                del row["failed"][seed]
                row.setdefault("again", {})[seed] = today
                keep({name: row})
    return sum(len(row["failed"]) for row in kept().values())


if __name__ == "__main__":
    sys.exit(min(main(*sys.argv[1:]), 1))
