"""Small random networks: the census equals the slow twin in every integer, and the weights those of the unwatched run.

Hypothesis draws a program: layers, a layer that is called again and again, layers that some forwards skip, norms,
activations (as modules, reused, functional, in place), gated products (of a function, of a module, in place, of one
layer's halves), GLU, heads that are split off before an activation, a head over several levels, recurrent cells written
by hand, residual sums, changes of layout, dropout, segments under activation checkpointing of either kind, a loss
inside the forward; and a way to train it: autocast, accumulation, the model called twice in a step, passes without
gradients in a step, evaluation passes, steps left out, short windows, frozen layers, a new run that goes on from the
last one's state.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, event, given, settings
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import neuronscope as ns
from tests.agreement.slow_twin import Nobody, Twin, Watched, assert_bits, assert_same, hook_tables, state_of

WIDTH = 6
#: Layout → shape of the input without its batch, and the neurons' dimension.
LAYOUTS = {
    "BD": ((WIDTH,), 1),
    "BTD": ((5, WIDTH), 2),
    "BCL": ((WIDTH, 5), 1),
    "BCHW": ((WIDTH, 3, 4), 1),
    "BHWC": ((3, 4, WIDTH), 3),
    "BCDHW": ((WIDTH, 2, 3, 2), 1),
    "BDHWC": ((2, 3, 2, WIDTH), 4),
    "channels last": ((WIDTH, 3, 4), 1),  # BCHW in that memory format
}
OTHER = {"BTD": "BCL", "BCHW": "BHWC", "BCDHW": "BDHWC"}
OTHER |= {turned: layout for layout, turned in OTHER.items()}
CONVOLUTIONS = {"BCL": nn.Conv1d, "BCHW": nn.Conv2d, "channels last": nn.Conv2d, "BCDHW": nn.Conv3d}
MODULES = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "mish": nn.Mish,
    "softplus": nn.Softplus,
    "hardtanh": nn.Hardtanh,
}
FUNCTIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "silu": F.silu,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "tanh": torch.tanh,
    "mish": F.mish,
    "softplus": F.softplus,
    "hardtanh": F.hardtanh,
}
IN_PLACE = ("relu", "relu6", "silu", "leaky_relu", "hardswish", "elu", "mish", "hardtanh")
OPERATIONS = (
    *(
        "layer",
        "same layer",
        "skipped",
        "norm",
        "module",
        "shared",
        "functional",
        "root",
        "in place",
        "gated",
        "gated by a module",
        "gated in place",
        "gated half",
        "glu",
        "heads",
        "heads first",
        "levels",
        "cell",
        "long cell",
        "residual",
        "turn",
        "drop",
        "scale",
    ),
)


#: Losses of the outputs ``(…, N, …)`` that a forward computes itself, by the activation that they use.
LOSSES: dict[str, tuple[str, Callable[[Tensor, int], Tensor]]] = {
    "hinge": ("relu", lambda y, axis: F.relu(1 - y)),
    "distance": ("relu", lambda y, axis: F.relu(0.5 - y.square().sum(axis, keepdim=True))),
    "pairs": ("softplus", lambda y, axis: F.softplus(y[:1] - y)),
    "probability": ("sigmoid", lambda y, axis: torch.sigmoid(y)),
    "share": ("relu", lambda y, axis: F.relu(y.softmax(axis) - 0.1)),
}


@dataclass(frozen=True)
class Program:
    """A network, and how it is trained."""

    layout: str
    loss: str
    operations: tuple[tuple[str, str], ...]
    segment: tuple[int, int]
    checkpointing: str
    shared: str
    shared_in_place: bool
    autocast: bool
    accumulate: int
    twice: bool
    window: int
    anew: bool
    evaluate: bool
    refer: bool
    every: int
    frozen: bool
    batch: int


@st.composite
def programs(draw: st.DrawFn) -> Program:
    operations = draw(
        st.lists(st.tuples(st.sampled_from(OPERATIONS), st.sampled_from(sorted(MODULES))), min_size=2, max_size=9)
    )
    start = draw(st.integers(0, len(operations)))
    stop = draw(st.integers(start, len(operations)))
    checkpointing = draw(st.sampled_from(["", "plain", "reentrant"]))
    if checkpointing == "reentrant":  # a recomputed function in no module with weights is unseen; see test_setups.py
        bare = ("root", "functional", "in place")
        operations[start:stop] = [("module" if kind in bare else kind, act) for kind, act in operations[start:stop]]
    kinds = [kind for kind, _ in operations]
    # Torch adds up the gradients of a weight over one autocast's calls in bfloat16, but apart for a part that reentrant
    # checkpointing runs again. The twin's network runs none again, so that its weights would differ.
    added_apart = checkpointing == "reentrant" and "same layer" in kinds[start:stop]
    added_apart &= "same layer" in kinds[:start] + kinds[stop:]
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    return Program(
        layout=layout,
        loss=draw(st.sampled_from(["", "", *LOSSES])),
        operations=tuple(operations),
        segment=(start, stop),
        checkpointing=checkpointing,
        shared=draw(st.sampled_from(IN_PLACE)),
        shared_in_place=draw(st.booleans()),
        # Torch's own 3-d convolutions in bfloat16 give other bits from run to run, watched or not.
        autocast=draw(st.booleans()) and layout not in ("BCDHW", "BDHWC") and not added_apart,
        accumulate=draw(st.integers(1, 2)),
        twice=draw(st.booleans()),
        window=draw(st.sampled_from([1, 2, 100])),
        anew=draw(st.booleans()),
        evaluate=draw(st.booleans()),
        refer=draw(st.booleans()),
        every=draw(st.integers(1, 2)),
        # Torch 2.13 crashes in the backward pass of GroupNorm, watched or not, if its channels-last input (which a
        # change of layout gives too) needs no gradient.
        frozen=draw(st.booleans()) and all(kind != "norm" for kind, _ in operations),
        batch=draw(st.sampled_from([1, 2, 3, WIDTH])),
    )


class Step(nn.Module):
    """One operation of a program; holds its layers, knows nothing of where it stands."""

    def __init__(self, kind: str, act: str, layout: str) -> None:
        super().__init__()
        self.kind = kind
        self.function = FUNCTIONS[act]
        self.options = {"inplace": True} if kind == "in place" and act in IN_PLACE else {}
        self.axis = LAYOUTS[layout][1]
        self.layout = layout
        if kind in ("layer", "skipped", *GATED, *HALVED, *SPLIT, "levels"):
            self.layer = layer(layout, 2 * WIDTH if kind in HALVED else WIDTH)
        if kind in CELLS:
            self.inner, self.recurrent = (layer(layout, CELLS[kind] * WIDTH) for _ in range(2))
        if kind in GATED:
            self.up = layer(layout)
        if kind == "glu":
            self.act = nn.GLU(self.axis)
        if kind == "norm":
            self.norm = norm(layout)
        if kind in ("module", "gated by a module"):
            self.act = MODULES[act]()
        if kind == "drop":
            self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind in ("functional", "in place"):
            return self.function(x * 0.9, **self.options)  # a fresh tensor, which may be changed in place
        if self.kind == "gated":
            return self.function(self.layer(x)) * self.up(x)
        if self.kind == "gated by a module":
            return self.up(x) * self.act(self.layer(x))
        if self.kind == "gated in place":
            return self.up(x).mul_(self.function(self.layer(x)))
        if self.kind == "gated half":
            gate, up = self.layer(x).chunk(2, self.axis)
            return self.function(gate) * up
        if self.kind in SPLIT:
            h = self.layer(x).unflatten(self.axis, (2, WIDTH // 2))
            if self.kind == "heads first":
                return self.function(h.movedim(self.axis, 0)).movedim(0, self.axis).flatten(self.axis, self.axis + 1)
            return self.function(h).flatten(self.axis, self.axis + 1)
        if self.kind == "levels":  # as a detector's head over maps of several sizes
            fine, coarse = (self.function(self.layer(level)) for level in (x, smaller(x, self.layout)))
            return fine + 0.5 * coarse.mean([dim for dim in range(x.dim()) if dim != self.axis], keepdim=True)
        if self.kind == "cell":
            h = torch.zeros_like(x)
            for _ in range(3):
                h = self.function(self.inner(x) + self.recurrent(h))
            return h
        if self.kind == "long cell":  # as an LSTM's
            h = c = torch.full_like(x, 0.1)  # the twin looks at gradients, and behind a zero there is none
            for _ in range(2):
                enter, keep, new, give = (self.inner(x) + self.recurrent(h)).chunk(4, self.axis)
                c = torch.sigmoid(keep) * c + torch.sigmoid(enter) * torch.tanh(new)
                h = torch.sigmoid(give) * torch.tanh(c)
            return h
        for child in self.children():
            x = child(x)
        return x if self._modules else x * 1.5 - 0.1


GATED = ("gated", "gated by a module", "gated in place")
HALVED = ("gated half", "glu")
SPLIT = ("heads", "heads first")
#: Cells, and how many times as wide as their state their layers are.
CELLS = {"cell": 1, "long cell": 4}


def smaller(x: Tensor, layout: str) -> Tensor:
    """Every second position along one dimension; of a layout without, the first row."""
    dims = [dim for dim in range(1, x.dim()) if dim != LAYOUTS[layout][1]]
    return x[:1] if not dims else x.index_select(dims[-1], torch.arange(0, x.shape[dims[-1]], 2))


def layer(layout: str, width: int = WIDTH) -> nn.Module:
    convolution = CONVOLUTIONS.get(layout)
    return nn.Linear(WIDTH, width) if convolution is None else convolution(WIDTH, width, 3, padding=1)


def norm(layout: str) -> nn.Module:
    return nn.GroupNorm(2, WIDTH) if layout in CONVOLUTIONS else nn.LayerNorm(WIDTH)


class Network(nn.Module):
    """Runs a program, one segment of it under a checkpoint, and tells where the neurons of its sites lie."""

    def __init__(self, program: Program, plain: bool) -> None:
        super().__init__()
        self.program = program
        self.checkpointing = "" if plain else program.checkpointing
        self.first = layer(program.layout)
        self.same = layer(program.layout)
        self.forwards = 0
        self.shared = MODULES[program.shared](**({"inplace": True} if program.shared_in_place else {}))
        self.steps = nn.ModuleList()
        self.layouts = [program.layout]
        self.axes: dict[str | None, int | tuple[int, ...]] = {}
        calls: Counter[str] = Counter()
        for number, (kind, act) in enumerate(program.operations):
            layout = self.layouts[-1]
            self.steps.append(Step(kind, act, layout))
            axis = LAYOUTS[layout][1]
            for name in (f"{act}()", f"{act}().gated", "act", "act.gated"):
                self.axes[f"steps.{number}.{name}"] = axis
            if kind in SPLIT:  # the head, and the unit in it
                self.axes[f"steps.{number}.{act}()"] = (axis, axis + 1) if kind == "heads" else (0, axis + 1)
            if kind in (*CELLS, "levels"):
                for name, call in itertools.product({act, "sigmoid", "tanh"}, range(6)):
                    self.axes[f"steps.{number}.{name}()" + (f"#{call}" if call else "")] = axis
            reused = {"shared": "shared", "root": f"{act}()"}.get(kind)
            if reused is not None:
                self.axes[f"{reused}#{calls[reused]}" if calls[reused] else reused] = axis
                calls[reused] += 1
            self.layouts.append(OTHER.get(layout, layout) if kind == "turn" else layout)
        self.last = nn.Tanh()
        self.axes["last"] = self.axis = LAYOUTS[self.layouts[-1]][1]
        if program.loss:
            self.logits = layer(self.layouts[-1])
            name, _ = LOSSES[program.loss]
            self.axes[f"{name}()#{calls[f'{name}()']}" if calls[f"{name}()"] else f"{name}()"] = self.axis
        if program.frozen and program.checkpointing != "reentrant":  # which asks that its input requires a gradient
            self.first.requires_grad_(False)

    def part(self, x: Tensor, start: int, stop: int, forward: int) -> Tensor:
        kept = x
        for number in range(start, stop):
            kind, act = self.program.operations[number]
            if kind == "turn":
                x = kept = turn(x, self.layouts[number])
            elif kind == "residual":
                x = kept = x + kept
            elif kind == "shared":
                x = self.shared(x + 0.1)
            elif kind == "same layer":  # as in a recurrent network, or a head over several levels
                x = self.same(x) if self.layouts[number] == self.program.layout else x
            elif kind == "skipped":  # as LayerDrop skips one
                x = self.steps[number](x) if forward % 3 else x
            elif kind == "root":
                x = FUNCTIONS[act](x)
            else:
                x = self.steps[number](x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += self.training
        start, stop = self.program.segment
        forward = self.forwards  # that of a part which runs again in a later backward pass, too
        x = self.part(self.first(x), 0, start, forward)
        if self.checkpointing and self.training:
            x = checkpoint(self.part, x, start, stop, forward, use_reentrant=self.checkpointing == "reentrant")
        else:
            x = self.part(x, start, stop, forward)
        x = self.last(self.part(x, stop, len(self.steps), forward))
        if not self.program.loss:
            return x
        return LOSSES[self.program.loss][1](self.logits(x), self.axis)


def turn(x: Tensor, layout: str) -> Tensor:
    """Neurons from axis 1 to the last, or back."""
    if layout not in OTHER:
        return x
    return x.movedim(1, -1) if LAYOUTS[layout][1] == 1 else x.movedim(-1, 1)


def train(program: Program, model: nn.Module, watcher: Nobody) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9) if trained else None
    generator = torch.Generator().manual_seed(11)

    def output() -> Tensor:
        x = torch.randn((program.batch, *LAYOUTS[program.layout][0]), generator=generator)
        if program.layout == "channels last":
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=program.autocast):
            return model(x).float()

    for number in range(3 * program.accumulate):
        loss = output().square().mean()
        if program.twice:
            loss = loss + output().mean()
        if program.refer:  # between a forward and its backward, as a reference model runs
            model.eval()
            with torch.no_grad():
                output()
            model.train()
        if loss.requires_grad:
            watcher.backward(loss)
        if number % program.accumulate == program.accumulate - 1:
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            watcher.step()
            if program.evaluate:
                model.eval()
                with watcher.phase("val"), torch.no_grad():
                    output()
                model.train()
        if program.anew and number == program.accumulate:
            watcher.attach_anew(model, watcher.state())


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_the_counts_of_any_random_network_equal_the_twins(program: Program):
    runs = []
    watched = Watched(every_n_steps=program.every, window_steps=program.window, policy=ns.Policy(max_rate=0.9))
    twin = None
    for watcher in (Nobody(), watched, "twin"):
        torch.manual_seed(0)
        model = Network(program, plain=watcher == "twin")
        if program.layout == "channels last":
            model.to(memory_format=torch.channels_last)
        if watcher == "twin":
            watcher = twin = Twin(model.axes, program.every)
        before = hook_tables(model)
        with watcher.attach(model):
            train(program, model, watcher)
        assert hook_tables(model) == before
        runs.append((state_of(model), torch.get_rng_state()))
    assert_bits(runs[0][0], runs[1][0])
    assert runs[0][1].equal(runs[1][1])
    assert watched.scope._hooks.failure is None
    assert torch.overrides._len_torch_function_stack() == 0
    phases = ["train", *["val"] * program.evaluate, *["inference"] * program.refer]
    assert set(watched.scope.phases) == set(phases)
    for phase in phases:
        truth = twin.tallies(phase)
        assert_same(watched.scope.census(phase), truth)
    sites = watched.scope.census()
    event(f"{min(len(sites), 5)} sites")
    for tally in sites.values():
        assert not tally.axis_source.startswith("assumed")
