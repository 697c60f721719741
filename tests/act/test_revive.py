"""Revived neurons have fresh weights and no influence yet, and nothing else has changed."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.act.revival import Revival
from neuronscope.act.rules import (
    ContinualBackprop,
    Dead,
    GraMa,
    ReDo,
    Resampling,
    Rule,
    SelfNormalizedResets,
    SiteActivity,
)
from neuronscope.act.structure import LayerWeights, Structure
from neuronscope.errors import DetachedError, NeuronscopeWarning, StateError, UsageError
from neuronscope.report.reading import report_from_dict
from neuronscope.writers.tensorboard import scalars
from tests.writers.test_json import VALIDATOR

Optimizer = torch.optim.Optimizer
DEAD = [0, 3]  # of every network here


class Perceptron(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
        self[0].bias.data[DEAD] = -100.0
        self[3].bias.data.fill_(5.0)  # no other one is dead


class Convolutions(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(24, 3)),
        )
        self[1].bias.data[DEAD] = -100.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.repeat(1, 9).reshape(len(x), 1, 6, 6))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        self.gate.bias.data[DEAD] = -1000.0  # silu is 0 there by underflow

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True, norm_first=True)
        self.block.linear1.bias.data[DEAD] = -100.0

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x[:, None].repeat(1, 3, 1)).mean(1)


#: The network, the site, what leads in, what reads.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, list[str], str]] = {
    "linear": (Perceptron, "0/relu", ["0"], "3"),
    "convolution and batch norm": (Convolutions, "1/relu", ["0", "1"], "5"),
    "gated unit": (Gated, "gate/swiglu", ["gate", "up"], "down"),
    "feed-forward of a transformer block": (Block, "block.linear1/relu", ["block.linear1"], "block.linear2"),
}


def adam(model: nn.Module) -> Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :1]).square().mean()


class Run:
    """A network that has trained three steps, and has then been watched for a window without a step."""

    def __init__(self, network: Callable[[], nn.Module] = Perceptron, optimizer: Any = adam, **options: Any) -> None:
        torch.manual_seed(0)
        self.model, self.x = network(), torch.randn(320, 4)
        self.optimizer = optimizer(self.model)
        for _ in range(3):
            self.step()
        self.scope = ns.watch(self.model, **options)
        self.window()

    def step(self) -> None:
        loss_of(self.model, self.x).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def window(self) -> None:
        loss_of(self.model, self.x).backward()
        self.scope.step()

    def bits(self) -> Tensor:
        torch.manual_seed(7)  # for dropout
        return self.model(self.x).detach().view(torch.int32)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items()}


@pytest.mark.parametrize("case", NETWORKS)
def test_the_function_on_the_window_does_not_change_by_a_bit(case: str) -> None:
    network, site, incoming, reader = NETWORKS[case]
    run = Run(network)
    before = run.bits()
    old = weights(run.model)  # after the forward, which changed running statistics
    random = torch.get_rng_state()
    done = ns.revive(run.scope, run.optimizer)
    assert torch.equal(torch.get_rng_state(), random)
    assert [(act.site, act.neurons) for act in done.acts] == [(site, tuple(DEAD))]
    new = weights(run.model)
    assert torch.equal(run.bits(), before)
    for name, value in new.items():
        layer = name.rpartition(".")[0]
        changed = (old[name] != value).reshape(len(value), -1).any(1) if value.dim() else torch.zeros(0)
        if layer in incoming:
            assert set(changed.nonzero().flatten().tolist()) <= set(DEAD), name
        elif name != f"{reader}.weight" and "num_batches" not in name and "running" not in name:
            assert torch.equal(old[name], value), name
    width = len(new[f"{reader}.weight"])
    columns = new[f"{reader}.weight"].reshape(width, 6, -1)
    assert not columns[:, DEAD].any()
    assert columns[:, [1, 2, 4, 5]].all()
    for layer in incoming:
        own = [name for name in new if name.rpartition(".")[0] == layer and new[name].dim()]
        assert any((new[name][DEAD] != old[name][DEAD]).any() for name in own)
    run.scope.detach()
    with ns.watch(run.model) as again:  # they fire, and their readers get gradients
        loss_of(run.model, run.x).backward()
        again.step()
    assert (again.census()[site].zero_output_fraction[DEAD] < 1).all()
    gradient = run.model.get_parameter(f"{reader}.weight").grad
    assert gradient is not None
    assert gradient.reshape(columns.shape)[:, DEAD].any()


def test_the_next_step_is_that_of_the_dead_network_but_for_the_new_weights() -> None:
    run, other = Run(), Run()
    ns.revive(run.scope, run.optimizer)
    for each in (run, other):
        each.optimizer.zero_grad()
        torch.manual_seed(1)
        each.step()
    ours, theirs = weights(run.model), weights(other.model)
    alive = [1, 2, 4, 5]
    assert torch.equal(ours["0.weight"][alive], theirs["0.weight"][alive])
    assert torch.equal(ours["3.weight"][:, alive], theirs["3.weight"][:, alive])
    assert ours["3.weight"][:, DEAD].any()


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9),
    "sgd without momentum": lambda m: torch.optim.SGD(m.parameters(), lr=1e-3),
    "adam, foreach": lambda m: torch.optim.Adam(m.parameters(), amsgrad=True, foreach=True),
    "adamw, fused": lambda m: torch.optim.AdamW(m.parameters(), fused=True),
    "two groups": lambda m: torch.optim.AdamW(
        [{"params": [m[0].weight, m[3].weight]}, {"params": [m[0].bias, m[3].bias], "weight_decay": 0.0}]
    ),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-4, momentum=0.9, centered=True),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), initial_accumulator_value=0.5),
    "nadam": lambda m: torch.optim.NAdam(m.parameters()),
}


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_moments_of_new_weights_are_those_of_a_fresh_optimizer_and_no_others_change(case: str) -> None:
    run = Run(optimizer=OPTIMIZERS[case])
    old = copy.deepcopy(run.optimizer.state_dict())["state"]
    ns.revive(run.scope, run.optimizer)
    start = 0.5 if case == "adagrad" else 0.0
    places = {run.model[0].weight: (0, DEAD), run.model[0].bias: (0, DEAD), run.model[3].weight: (1, DEAD)}
    checked = 0
    for number, weight in enumerate(each for group in run.optimizer.param_groups for each in group["params"]):
        for key, value in run.optimizer.state[weight].items():
            before = old[number][key]
            if not isinstance(value, Tensor) or not value.dim():
                assert value == before  # the number of steps
                continue
            expected = before.clone()
            if weight in places:
                dim, index = places[weight]
                expected.index_fill_(dim, torch.tensor(index), start)
                checked += 1
            assert torch.equal(value, expected), (number, key)
    assert checked >= (3 if case != "sgd without momentum" else 0)


def test_gradients_that_wait_for_the_next_step_are_not_those_of_the_old_neuron() -> None:
    run = Run()
    assert all(each.grad is not None for each in run.model.parameters())
    done = ns.revive(run.scope, run.optimizer, ReDo(tau=1.0))
    neurons = list(done.acts[0].neurons)
    assert not run.model[0].weight.grad[neurons].any()
    assert not run.model[3].weight.grad[:, neurons].any()


def test_the_same_seed_draws_the_same_and_another_one_others() -> None:
    drawn = []
    for seed in (0, 0, 1):
        run = Run()
        ns.revive(run.scope, run.optimizer, seed=seed)
        drawn.append(run.model[0].weight.detach()[DEAD])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_rule_brings_its_own_initialiser() -> None:
    def init(module: nn.Module) -> None:
        nn.init.constant_(module.weight, 0.25)
        nn.init.constant_(module.bias, 0.5)

    run = Run()
    ns.revive(run.scope, run.optimizer, Dead(init=init))
    assert (run.model[0].weight[DEAD] == 0.25).all()
    assert (run.model[0].bias[DEAD] == 0.5).all()


def test_two_layers_in_a_row_share_a_weight_and_its_column_is_zero() -> None:
    run = Run(lambda: (net := Perceptron(), net[3].bias.data[:2].fill_(-100.0))[0])
    before = run.bits()
    done = ns.revive(run.scope, run.optimizer)
    assert [act.neurons for act in done.acts] == [(0, 3), (0, 1)]
    assert not run.model[3].weight[:, DEAD].any()
    assert run.model[3].weight[:2, [1, 2, 4, 5]].all()
    assert torch.equal(run.bits(), before)


# --- the record


def test_an_act_closes_the_window_so_that_no_window_has_both_neurons() -> None:
    run = Run()
    ns.revive(run.scope, run.optimizer)
    assert run.scope.census(window="last").last_step == 0
    assert not run.scope.census(window="open")["0/relu"].positions
    run.window()
    opened = run.scope.census(window="open")["0/relu"]
    assert (opened.zero_output_fraction[DEAD] < 1).all()
    assert opened.positions == 320
    assert run.scope.census()["0/relu"].positions == 640


def test_a_window_is_acted_on_once() -> None:
    run = Run(lambda: Perceptron())
    first, second = (ns.revive(run.scope, run.optimizer, Dead(init=dead_init)) for _ in range(2))
    assert (first.neurons, second.neurons) == (2, 0)
    run.window()
    assert ns.revive(run.scope, run.optimizer).neurons == 2  # they were born dead again
    assert [act.step for act in run.scope.acts] == [1, 2]


def dead_init(module: nn.Module) -> None:
    nn.init.constant_(module.weight, 0.0)
    nn.init.constant_(module.bias, -1.0)


def test_reports_and_states_have_the_acts() -> None:
    run = Run()
    assert run.scope.report().to_dict()["acts"] == []
    ns.revive(run.scope, run.optimizer)
    run.window()
    ns.revive(run.scope, run.optimizer)
    report = run.scope.report()
    assert [(act.step, act.site, act.neurons, act.rule, act.last_step) for act in report.acts] == [
        (1, "0/relu", (0, 3), "Dead()", 0)
    ]
    note = "Revived so far: 2 neurons at 1 step (0/relu 2), last 2 at step 1 by Dead()."
    for text in (str(report), report.to_markdown(), report.to_html()):
        assert note in text
    plain = json.loads(report.to_json())
    VALIDATOR.validate(plain)
    assert plain["acts"] == [
        {"step": 1, "site": "0/relu", "neurons": [0, 3], "rule": "Dead()", "first_step": 0, "last_step": 0}
    ]
    assert report_from_dict(plain).acts == report.acts
    assert scalars(report)["neuronscope/revived_total"] == 2.0
    assert report["0/relu"].history.revivals[DEAD].tolist() == [1, 1]  # and they were seen to fire

    state = run.scope.state_dict()
    with ns.watch(run.model) as other:
        other.load_state_dict(torch.load(saved(state), weights_only=True))
        assert other.acts == run.scope.acts
        for field in ("zero_outputs", "positions", "step"):
            ours, theirs = (getattr(each.act_record.before("0/relu", 6), field) for each in (run.scope, other))
            assert np.array_equal(ours, theirs)
        damaged = copy.deepcopy(state)
        damaged["acts"]["acts"][0]["neurons"] = "all"
        with pytest.raises(StateError, match="acts"):
            other.load_state_dict(damaged)


def saved(state: dict[str, Any]) -> Any:
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


# --- rules


def activity(zeros: list[int], abs_sum: list[float], **changes: Any) -> SiteActivity:
    run = Run()
    run.scope.close_window()
    window = run.scope.closed_window["0/relu"]
    counts = {
        "zero_outputs": np.array(zeros),
        "zero_gradients": np.array(zeros),
        "not_finite_outputs": np.zeros(6, dtype=np.int64),
        "abs_sum": np.array(abs_sum),
        "positions": 100,
        "gradient_positions": 100,
        "examples": changes.pop("examples", 100),
    }
    window = type(window)(**{**vars(window), **counts})
    defaults = {
        "zero_outputs": np.zeros(6, dtype=np.int64),
        "positions": np.zeros(6, dtype=np.int64),
        "silent": np.full(6, float(counts["examples"])),
        "age": np.full(6, 1000),
        "steps": 1000,
        "revived": 0,
    }
    structure = Structure(run.model).of("0/relu", window)
    return SiteActivity("0/relu", window, structure=structure, policy=ns.Policy(), **{**defaults, **changes})


def test_redo_takes_those_of_a_score_of_at_most_tau() -> None:
    site = activity([100, 0, 0, 0, 0, 0], [0.0, 1.0, 5.0, 10.0, 100.0, 484.0])  # their mean is 100
    for tau, expected in ((0.0, 1), (0.01, 2), (0.025, 2), (0.05, 3), (0.1, 4)):
        assert ReDo(tau=tau + 1e-9).choose(site).tolist() == [True] * expected + [False] * (6 - expected)
    assert Dead().choose(site).tolist() == [True] + [False] * 5


def test_self_normalized_resets_ask_each_neuron_by_its_own_rate() -> None:
    # Rates of firing before: never, 1 %, 3 %, 5 %, always; the last one fires in the window. ln .02 / ln(1 - p) is 389,
    # 128 and 76 examples. The first one has the mean of the others, 31.8 %: 11 examples.
    before = {"zero_outputs": np.array([1000, 990, 970, 950, 0, 500]), "positions": np.full(6, 1000)}
    zeros, sums = [100, 100, 100, 100, 100, 99], [0.0] * 5 + [1.0]
    chosen = {
        examples: SelfNormalizedResets(eta=0.02).choose(activity(zeros, sums, examples=examples, **before)).tolist()
        for examples in (10, 75, 100, 130, 390)
    }
    for examples, expected in ((10, [4]), (75, [0, 4]), (100, [0, 3, 4]), (130, [0, 2, 3, 4]), (390, [0, 1, 2, 3, 4])):
        assert [*np.flatnonzero(chosen[examples])] == expected
    nobody = activity([100] * 6, [0.0] * 6)
    assert not SelfNormalizedResets(eta=0.02).choose(nobody).any()  # no rate is known of any


def test_self_normalized_resets_at_each_step_are_those_of_their_paper() -> None:
    # The paper keeps the age of each neuron, in examples since it fired, at each step. Here a loop keeps all outputs.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 3))
    optimizer, batch = torch.optim.Adam(model.parameters(), lr=0.03), 16
    outputs: list[Tensor] = []
    model[1].register_forward_hook(lambda module, inputs, output: outputs.append(output.detach().clone()))
    lives: list[list[list[bool]]] = [[] for _ in range(24)]  # of each neuron since it was revived: of each step
    found, expected = [], []
    with ns.watch(model, window_steps=1, policy=ns.Policy(max_rate=0.2)) as scope:
        for _ in range(120):
            x = torch.randn(batch, 4) + 1.5
            (model(x) - x[:, :3]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            scope.step()
            for neuron, life in enumerate(lives):
                life.append((outputs[-1][:, neuron] != 0).tolist())
            ages = [next((age for age, step in enumerate(life[::-1]) if any(step)), len(life)) for life in lives]
            spans = [(sum(map(sum, life)), batch * (len(life) - age)) for life, age in zip(lives, ages, strict=True)]
            known = [fired / seen for fired, seen in spans if fired]
            rates = [fired / seen if fired else sum(known) / len(known) for fired, seen in spans]
            due = [n for n in range(24) if ages[n] and (1 - rates[n]) ** (batch * ages[n]) <= 0.02]
            acts = ns.revive(scope, optimizer, SelfNormalizedResets(eta=0.02)).acts
            found.append([neuron for act in acts for neuron in act.neurons])
            expected.append(due)
            for neuron in due:
                lives[neuron] = []
    assert found == expected
    assert sum(map(len, found)) > 20
    assert any(len(life) < 100 for life in lives)


def test_self_normalized_resets_count_from_the_newest_revival() -> None:
    run = Run()
    ns.revive(run.scope, run.optimizer)
    for _ in range(2):
        run.window()
        run.scope.close_window()
    seen: list[SiteActivity] = []

    class Noting(Rule):
        def choose(self, site: SiteActivity) -> Any:
            seen.append(site)
            return np.zeros(site.window.neurons, dtype=np.bool_)

    ns.revive(run.scope, run.optimizer, Noting())
    site = next(each for each in seen if each.name == "0/relu")
    assert not site.silent.any()  # all fired in the newest step
    assert site.positions.tolist() == [320, 640, 640, 320, 640, 640]
    assert (site.zero_outputs[DEAD] < 320).all()  # not the 320 zeros of the old neurons
    assert site.age.tolist() == [2, 3, 3, 2, 3, 3]


def test_a_silence_is_counted_over_windows_at_their_steps_mean_examples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen: list[list[float]] = []

    class Noting(Rule):
        def choose(self, site: SiteActivity) -> Any:
            seen.append(site.silent.tolist())
            return np.zeros(3, dtype=np.bool_)

    biases = {0: 9.0, 2: -100.0}  # from a step on, of neuron 1
    with ns.watch(model, every_n_steps=1) as scope:
        model[0].bias.data.fill_(9.0)
        model[0].bias.data[2] = -100.0  # it never fires
        for step in range(7):
            model[0].bias.data[1] = biases.get(step, float(model[0].bias.data[1]))
            model(torch.randn(300, 4)).sum().backward()
            optimizer.step()
            scope.step()
            if step in (0, 3, 6):
                ns.revive(scope, optimizer, Noting())
    assert seen == [[0, 0, 300], [0, 600, 1200], [0, 1500, 2100]]


def test_continual_backprop_takes_the_least_useful_mature_ones_at_its_rate() -> None:
    ages = np.array([50, 1000, 1000, 1000, 1000, 1000])
    site = activity([0] * 6, [0.0, 1.0, 2.0, 400.0, 500.0, 600.0], age=ages)
    utility = site.window.mean_abs_output * site.outgoing()
    order = [int(each) for each in np.argsort(utility) if each != 0]
    for rate, revived, expected in ((1e-4, 0, 0), (2e-4, 0, 1), (4e-4, 0, 2), (4e-4, 1, 1), (4e-4, 2, 0)):
        site = activity([0] * 6, [0.0, 1.0, 2.0, 400.0, 500.0, 600.0], age=ages, revived=revived)
        chosen = ContinualBackprop(rate=rate, maturity=100).choose(site)
        assert sorted(np.flatnonzero(chosen)) == sorted(order[:expected])
    weight = Run().model[3].weight.detach().double().abs().sum(0)
    assert np.allclose(site.outgoing(), weight.numpy())


def test_grama_chooses_the_neurons_with_a_small_gradient_at_their_output() -> None:
    run = Run()
    run.model[3].weight.data *= torch.tensor([1.0, 1e-3, 1.0, 1.0, 2e-2, 0.3])  # 1 and 4 fire, and matter little
    run.model.eval()
    measured = ns.representation(run.model, run.x, lambda output, x: (output - x[:, :1]).square().mean())
    assert run.scope.census()["0/relu"].examples == len(run.x)  # those of the window alone
    model = copy.deepcopy(run.model)
    output = model[1](model[0](run.x)).detach().requires_grad_()
    (model[5](model[4](model[3](output))) - run.x[:, :1]).square().mean().backward()
    assert output.grad is not None
    sizes = output.grad.double().abs().mean(0)
    chosen = {}
    for tau in (0.0, 0.025, 0.5, 2.0):
        chosen[tau] = GraMa(measured, tau=tau).choose(activity([0] * 6, [1.0] * 6)).tolist()
        assert chosen[tau] == (sizes / sizes.mean() <= tau).tolist()
    assert len({sum(each) for each in chosen.values()}) > 2
    done = ns.revive(run.scope, run.optimizer, GraMa(measured, tau=0.025))
    expected = tuple(neuron for neuron, small in enumerate(chosen[0.025]) if small)
    assert [(act.site, act.neurons, act.rule) for act in done.acts] == [("0/relu", expected, "GraMa(tau=0.025)")]


def test_grama_leaves_layers_alone_that_were_not_measured() -> None:
    run, other = Run(), Run(Convolutions)
    measured = ns.representation(other.model, other.x, lambda output, x: output.square().mean())
    assert not ns.revive(run.scope, run.optimizer, GraMa(measured, tau=1e9)).neurons


def test_grama_needs_a_measure_with_a_loss() -> None:
    run = Run()
    with pytest.raises(UsageError, match="with a loss, but got one without"):
        GraMa(ns.representation(run.model, run.x))
    with pytest.raises(UsageError, match="but got float"):
        GraMa(0.1)  # type: ignore[arg-type]


def autoencoder() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    model[0].bias.data[DEAD] = -100.0
    return model


def test_resampled_neurons_point_to_a_badly_reconstructed_example() -> None:
    run = Run(autoencoder)
    before, random, old = run.bits(), torch.get_rng_state(), weights(run.model)
    losses = torch.zeros(320)
    losses[17] = 3.0
    done = ns.revive(run.scope, run.optimizer, Resampling(run.x, losses))
    assert torch.equal(torch.get_rng_state(), random)
    assert [(act.neurons, act.rule) for act in done.acts] == [((0, 3), "Resampling(scale=0.2)")]
    new, example = weights(run.model), run.x[17].double()
    living = [1, 2, 4, 5]
    norm = sum(float(old["0.weight"][row].double().square().sum()) ** 0.5 for row in living) / 4
    for row in DEAD:
        expected = 0.2 * norm * example / float(example.square().sum()) ** 0.5
        assert torch.allclose(new["0.weight"][row].double(), expected, rtol=1e-6, atol=0)
        assert new["0.bias"][row] == 0
    assert torch.equal(new["0.weight"][living], old["0.weight"][living])
    assert not new["2.weight"][:, DEAD].any()
    assert torch.equal(run.bits(), before)


def test_an_example_is_drawn_with_its_loss_squared() -> None:
    layer = LayerWeights.of("", nn.Linear(2, 5001))
    rule, fresh = Resampling(torch.eye(2), torch.tensor([1.0, 2.0])), {"weight": torch.zeros(5001, 2)}
    rule.refine(layer, fresh, range(5000))
    second = float((fresh["weight"][:5000, 1] > 0).double().mean())
    assert abs(second - 0.8) < 0.03  # 4 of 5; the standard deviation is 0.006
    assert not fresh["weight"][5000].any()


@pytest.mark.parametrize(
    ("inputs", "losses"), [((5, 4), [1.0] * 4), ((5,), [1.0] * 5), ((2, 4), [0.0, 0.0]), ((2, 4), [1.0, -1.0])]
)
def test_resampling_says_which_examples_it_needs(inputs: tuple[int, ...], losses: list[float]) -> None:
    with pytest.raises(UsageError, match=r"as many finite `losses` \(E,\)"):
        Resampling(torch.ones(inputs), torch.tensor(losses))


@pytest.mark.parametrize("network", [autoencoder, Convolutions])
def test_resampling_leaves_layers_of_other_inputs_alone(network: Callable[[], nn.Module]) -> None:
    run = Run(network)
    old = weights(run.model)
    assert not ns.revive(run.scope, run.optimizer, Resampling(torch.ones(2, 7), torch.ones(2))).neurons
    assert all(torch.equal(value, old[name]) for name, value in weights(run.model).items())


def test_columns_of_a_flattened_map_are_all_in_the_utility() -> None:
    run = Run(Convolutions)
    run.scope.close_window()
    found = Structure(run.model).of("1/relu", run.scope.closed_window["1/relu"])
    site = activity([0] * 6, [0.0] * 6)
    site = type(site)(**{**vars(site), "structure": found})
    expected = run.model[5].weight.detach().double().abs().reshape(3, 6, 4).sum((0, 2))
    assert np.allclose(site.outgoing(), expected.numpy())


# --- what cannot be done


def left(network: Callable[[], nn.Module], optimizer: Any = adam) -> str:
    """What is said of the dead neurons that are left; nothing is changed."""
    run = Run(network, optimizer)
    before = weights(run.model)
    done = ns.revive(run.scope, run.optimizer)
    assert done.neurons == 0
    assert not run.scope.acts
    for name, each in weights(run.model).items():
        assert torch.equal(each, before[name])
    (reason,) = done.left.values()
    assert "\n" not in reason
    assert f"Left as they are: {next(iter(done.left))}: {reason}." in str(done)
    return reason


class Residual(Perceptron):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self[0](x))
        return self[5](self[3](h + self[0](x)))


class NormReads(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.Linear(6, 3))
        self[0].bias.data[DEAD] = -100.0


class Tied(Perceptron):
    """The second layer's weight is the first one's too: what it reads and what it gives are of one width."""

    def __init__(self) -> None:
        super().__init__()
        self[3], self[5] = nn.Linear(6, 6), nn.Linear(6, 3)
        self.again = nn.Linear(6, 6)
        self.again.weight = self[3].weight

    def forward(self, x: Tensor) -> Tensor:
        return self[5](self.again(self[3](torch.relu(self[0](x)))))


class OwnLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2, self.bias)


def own_class() -> nn.Module:
    net = Perceptron()
    net[3] = OwnLinear(6, 5)
    net[3].bias.data.fill_(5.0)
    return net


def test_neurons_whose_weights_are_not_known_exactly_are_left() -> None:
    assert "added in" in left(Residual)
    assert "`2` reads it channel by channel" in left(NormReads)
    assert left(Tied)
    assert "OwnLinear" in left(own_class)


def test_a_weight_of_infinity_is_left_because_its_product_with_zero_is_not_zero() -> None:
    run = Run()
    run.model[3].weight.data[0, 0] = float("inf")
    done = ns.revive(run.scope, run.optimizer)
    assert "not finite" in done.left["0/relu"]
    assert [act.neurons for act in done.acts] == [(3,)]
    assert run.model[3].weight[0, 0].isinf()


def test_an_optimizer_that_does_not_hold_the_weights() -> None:
    assert "does not hold `0.weight`" in left(Perceptron, lambda m: torch.optim.Adam(m[3].parameters()))
    assert "does not hold `3.weight`" in left(Perceptron, lambda m: torch.optim.Adam(m[0].parameters()))
    run = Run()
    with pytest.raises(UsageError, match="holds none of them"):
        ns.revive(run.scope, torch.optim.Adam(Perceptron().parameters()))
    assert not run.scope.acts


@pytest.mark.parametrize("layer", [0, 3])
def test_frozen_weights_are_left_even_if_the_optimizer_holds_them(layer: int) -> None:
    def frozen(model: nn.Module) -> torch.optim.Optimizer:
        model.get_submodule(str(layer)).requires_grad_(False)
        return adam(model)

    assert left(Perceptron, frozen) == f"`{layer}.weight` is frozen"


def test_an_optimizer_whose_state_is_not_known() -> None:
    assert "Rprop keeps" in left(Perceptron, lambda m: torch.optim.Rprop(m.parameters(), lr=1e-4))
    assert "Adafactor keeps" in left(Perceptron, lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-4))


class Wrapping(torch.optim.SGD):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=1e-4)
        self.inner = torch.optim.Adam(self.param_groups[0]["params"])


def test_an_optimizer_that_hides_another_one() -> None:
    assert left(Perceptron, lambda m: Wrapping(m.parameters())) == "Wrapping wraps another optimizer"


def test_several_optimizers_hold_the_weights_together() -> None:
    run = Run()
    optimizers = [torch.optim.Adam(run.model[0].parameters()), torch.optim.SGD(run.model[3].parameters())]
    assert ns.revive(run.scope, optimizers).neurons == 2


def test_too_few_examples() -> None:
    run = Run()
    ns.revive(run.scope, run.optimizer)
    loss_of(run.model, run.x[:100]).backward()
    run.scope.step()
    done = ns.revive(run.scope, run.optimizer, "dormant")
    assert (done.neurons, done.left) == (0, {})
    assert run.scope.census(window="open")["0/relu"].positions == 100  # the window goes on
    assert str(done) == "0 neurons were revived."


def test_a_window_that_is_too_short_says_so() -> None:
    run = Run(policy=ns.Policy(max_rate=0.005))  # asks for 598 examples
    run.window()
    assert ns.revive(run.scope, run.optimizer).neurons == 2


def test_bad_arguments() -> None:
    run = Run()
    for bad in ({"scope": run.model}, {"optimizer": run.model}, {"optimizer": []}, {"rule": "all"}, {"rule": 3}):
        with pytest.raises(UsageError):
            ns.revive(**{"scope": run.scope, "optimizer": run.optimizer, **bad})
    for make in (lambda: ReDo(tau=-1.0), lambda: SelfNormalizedResets(eta=1.0), lambda: ContinualBackprop(rate=2.0)):
        with pytest.raises(UsageError):
            make()
    run.scope.detach()
    with pytest.raises(DetachedError, match=r"`revive\(\)`.*inside the `with` block"):
        ns.revive(run.scope, run.optimizer)


def test_a_rule_without_choose_and_an_initialiser_that_fails_change_nothing() -> None:
    def init(module: nn.Module) -> None:
        raise RuntimeError("no")

    run = Run()
    before = weights(run.model)
    random = torch.get_rng_state()
    for rule, error in ((Rule(), NotImplementedError), (Dead(init=init), RuntimeError)):
        with pytest.raises(error):
            ns.revive(run.scope, run.optimizer, rule)
    for name, each in weights(run.model).items():
        assert torch.equal(each, before[name])
    assert torch.equal(torch.get_rng_state(), random)
    assert not run.scope.acts
    assert ns.revive(run.scope, run.optimizer).neurons == 2  # the window is still there


def test_a_scripted_reader_cannot_be_followed() -> None:
    def network() -> nn.Module:
        net = Perceptron()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            net[3] = torch.jit.script(net[3])
        return net

    assert left(network)


def test_a_network_of_nothing_seen_is_left() -> None:
    model = Perceptron()
    with ns.watch(model) as scope:
        assert ns.revive(scope, adam(model)) == Revival((), {})


def test_monitors_revive_only_if_asked_to() -> None:
    from neuronscope.callbacks import Monitor

    for options, expected in (({}, 0), ({"revive": "dead"}, 2), ({"revive": "dead", "revive_every": 100}, 2)):
        torch.manual_seed(0)
        model, x = Perceptron(), torch.randn(320, 4)
        monitor = Monitor(every_n_steps=1, window_steps=1, **options)
        monitor.optimizers = [adam(model)]
        monitor.attach(model)
        for step in range(1, 4):
            monitor.begin_batch()
            loss_of(model, x).backward()
            monitor.step(step)
        scope = monitor.scope
        assert scope is not None
        assert sum(len(act.neurons) for act in scope.acts) == expected
        again = Monitor(every_n_steps=1, window_steps=1, **options)
        again.load_state_dict(monitor.state_dict())
        again.attach(model, 3)
        assert again.scope is not None
        assert again.scope.acts == scope.acts
        monitor.finish()
        again.finish()


def test_a_monitor_without_an_optimizer_says_so_and_the_training_goes_on() -> None:
    from neuronscope.callbacks import Monitor

    model = Perceptron()
    monitor = Monitor(every_n_steps=1, window_steps=1, revive="dead")
    monitor.attach(model)
    monitor.begin_batch()
    loss_of(model, torch.randn(320, 4)).backward()
    with pytest.warns(NeuronscopeWarning, match="optimizer"):
        monitor.step(1)
    monitor.finish()
    with pytest.raises(UsageError, match="revive_every"):
        Monitor(revive="dead", revive_every=0)
    with pytest.raises(UsageError, match="rule"):
        Monitor(revive="all")
