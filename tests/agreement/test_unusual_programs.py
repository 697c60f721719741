"""Programs that people really write and that trip tools up: each is counted as the twin counts it, and unharmed."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import neuronscope as ns
from tests.agreement.slow_twin import Nobody, Twin, Watched, assert_bits, assert_same, hook_tables, state_of

STEPS = 20


def data(step: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def plain(model: nn.Module, step: int) -> Tensor:
    return model(data(step, 5, 4)).square().mean()


@dataclass(frozen=True)
class Case:
    """A model, what one step of training computes, and where the neurons lie."""

    name: str
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, int], Tensor] = plain
    axis: dict[str | None, int] = field(default_factory=lambda: {None: 1})


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 2))


class Tied(nn.Module):
    """Embedding and head share a weight, and one activation bears two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc, self.act = nn.Embedding(11, 6), nn.Linear(6, 6), nn.ReLU()
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.alias = self.act

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.alias(self.fc(self.act(self.embedding(x)))))


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.T) / 2


def parametrized() -> nn.Module:
    model = mlp()
    torch.nn.utils.parametrize.register_parametrization(model[3], "weight", Symmetric())
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[5])
    return model


def normed_by_hooks() -> nn.Module:
    """Hooks of the layers compute their weights before each forward, as torch did before parametrizations."""
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[0])
        nn.utils.weight_norm(model[3], dim=None)
    nn.utils.spectral_norm(model[5])
    return model


def pruned() -> nn.Module:
    model = mlp()
    torch.nn.utils.prune.l1_unstructured(model[3], "weight", amount=0.3)
    return model


class LowRank(nn.Module):
    """A frozen layer with an addition of low rank that is trained, as LoRA has it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(base.in_features, 2) * 0.1)
        self.up = nn.Parameter(torch.zeros(2, base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down @ self.up * 2.0


def adapted() -> nn.Module:
    return nn.Sequential(
        *(LowRank(layer) if isinstance(layer, nn.Linear) else layer for layer in mlp())  # the activations stay
    )


def with_other_weights(model: nn.Module, step: int) -> Tensor:
    weights = {name: weight * 1.01 for name, weight in model.named_parameters()}
    return torch.func.functional_call(model, weights, (data(step, 5, 4),)).square().mean()


def with_a_target_without_gradients(model: nn.Module, step: int) -> Tensor:
    with torch.no_grad():
        target = model(data(step + 100, 5, 4))
    return (model(data(step, 5, 4)) - target).square().mean()


class Hooked(nn.Module):
    """Hooks of the user's that give another input and another output."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.head = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)
        self.fc.register_forward_hook(lambda module, args, output: output * 2.0)
        self.head.register_forward_pre_hook(lambda module, args: (args[0] - 0.3,))
        self.head.register_full_backward_hook(lambda module, inner, outer: tuple(each * 0.5 for each in inner))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.fc(x)))


@dataclasses.dataclass
class Answer:
    logits: Tensor
    hidden: Tensor


class Answering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.head = nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Answer:
        hidden = self.act(self.fc(x))
        return Answer(self.head(F.relu(hidden)), hidden)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc, self.act = nn.GRU(4, 6, batch_first=True), nn.Linear(6, 6), nn.ReLU()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed, _ = self.rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        packed = packed._replace(data=self.act(self.fc(packed.data)))  # (tokens of all rows, features)
        return pad_packed_sequence(packed, batch_first=True)[0]


class Generating(nn.Module):
    """The layers are run by a generator, within the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.act = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), nn.ReLU()

    def states(self, x: Tensor) -> Iterator[Tensor]:
        for layer in self.layers:
            x = self.act(layer(x))
            yield x

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(list(self.states(x))).sum(0)


def with_a_scope_in_every_step(model: nn.Module, step: int) -> Tensor:
    with ns.watch(model) as inner:
        loss = plain(model, step)
        inner.step()
    assert inner.census()["0/relu"].positions == 5
    return loss


def with_activations_kept_elsewhere(model: nn.Module, step: int) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return plain(model, step)


class Both(nn.Module):
    """What a linear layer gives is rectified from both sides (Shang et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        return torch.cat([F.relu(x), F.relu(-x)], -1)


class Prompted(nn.Module):
    """Nothing is trained but what is added to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp().requires_grad_(False)
        self.prompt = nn.Parameter(torch.zeros(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + self.prompt)


class Volumes(nn.Module):
    """(B, C, D, H, W), (B, C, L) and (B, T, D) in one model, as many channels as places in each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv3, self.conv1, self.fc = nn.Conv3d(1, 4, 1), nn.Conv1d(4, 4, 1), nn.Linear(4, 4)
        self.relu, self.silu, self.elu = nn.ReLU(), nn.SiLU(), nn.ELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv3(x)).mean((3, 4))
        x = self.silu(self.conv1(x)).transpose(1, 2)
        return self.elu(self.fc(x))


CASES = (
    Case("tied weights", Tied, lambda model, step: model(torch.arange(8).view(2, 4)).square().mean(), {None: 2}),
    Case("parametrized weights", parametrized),
    Case("weight norm and spectral norm by hooks", normed_by_hooks),
    Case("pruned weights", pruned),
    Case("additions of low rank", adapted),
    Case("functional_call", mlp, with_other_weights),
    Case("a target without gradients", mlp, with_a_target_without_gradients),
    Case("hooks that give other values", Hooked),
    Case("a dataclass as output", Answering, lambda model, step: model(data(step, 5, 4)).logits.square().mean()),
    Case(
        "packed sequences",
        Packed,
        lambda model, step: model(data(step, 3, 5, 4), torch.tensor([5, 3, 2])).square().mean(),
    ),
    Case("a generator", Generating),
    Case("a scope within a scope", mlp, with_a_scope_in_every_step),
    Case("activations kept elsewhere", mlp, with_activations_kept_elsewhere),
    Case("both signs", Both),
    Case("a prompt that is trained", Prompted),
    Case("float64", lambda: mlp().double(), lambda model, step: model(data(step, 5, 4).double()).square().mean()),
    Case("bfloat16", lambda: mlp().bfloat16(), lambda model, step: model(data(step, 5, 4).bfloat16()).square().mean()),
    Case(
        "volumes, signals and tokens",
        Volumes,
        lambda model, step: model(data(step, 2, 1, 4, 4, 4)).square().mean(),
        {"relu": 1, "silu": 1, "elu": 2},
    ),
)


def run(case: Case, watcher: Nobody) -> tuple[dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    model = case.build()
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    before = hook_tables(model)
    with watcher.attach(model):
        for step in range(STEPS):
            watcher.backward(case.loss(model, step))
            optimizer.step()
            optimizer.zero_grad()
            watcher.step()
    assert hook_tables(model) == before
    assert torch.overrides._len_torch_function_stack() == 0
    return state_of(model), torch.get_rng_state()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_unusual_program_is_counted_as_by_the_twin_and_unchanged(case: Case):
    watched, twin = Watched(), Twin(case.axis)
    (plain_state, plain_random), (state, random), _ = (run(case, watcher) for watcher in (Nobody(), watched, twin))
    assert_bits(plain_state, state)
    assert plain_random.equal(random)
    assert watched.scope._hooks.failure is None
    for phase in ("train", "inference"):
        assert_same(watched.scope.census(phase), twin.tallies(phase))
    assert all(tally.axis_source.startswith("layer (") for tally in watched.scope.census().values())


def test_a_forward_in_another_thread_is_counted():
    """As where a server answers, or a data loader's thread asks the model."""
    watched, here = Watched(), Watched()

    def answer(model: nn.Module, step: int) -> Tensor:
        return model(data(step, 5, 4)).logits.square().mean()

    def elsewhere(model: nn.Module, step: int) -> Tensor:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            return pool.submit(answer, model, step).result()

    states = [run(Case("", Answering, loss), watcher)[0] for loss, watcher in ((elsewhere, watched), (answer, here))]
    assert_bits(*states)
    assert list(watched.scope.census()) == list(here.scope.census()) == ["fc/silu", "fc/relu"]
    for name, tally in here.scope.census().items():
        assert watched.scope.census()[name].zero_outputs.tolist() == tally.zero_outputs.tolist()
        assert watched.scope.census()[name].gradient_positions == tally.gradient_positions == 5 * STEPS


def test_simultaneous_forwards_in_several_threads_are_not_counted_and_reported():
    """Each thread has a stack of function modes of its own: what is on it is what the user put there, before and after.

    Two threads meet in the middle of a forward; the first is counted, the second runs as if nobody watched.
    """
    meeting = threading.Barrier(2, timeout=60)

    class Meeting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            meeting.wait()
            return x

    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), Meeting(), nn.Linear(6, 6), Rectifying())
    before = hook_tables(model)

    def forward(number: int) -> tuple[Tensor, list[str]]:
        with torch.device("cpu"):
            y = model(data(number, 5, 4))
            return y, [type(mode).__name__ for mode in torch.overrides._get_current_function_mode_stack()]

    expected = [model[4](model[3](model[1](model[0](data(number, 5, 4))))) for number in range(2)]
    with ns.watch(model) as scope:
        for _ in range(10):
            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                found = list(pool.map(forward, range(2)))
            for (y, modes), wanted in zip(found, expected):
                assert y.equal(wanted)
                assert modes == ["DeviceContext"]
            sum(y for y, _ in found).sum().backward()
            scope.step()
    assert scope._hooks.failure is None
    assert hook_tables(model) == before
    assert torch.overrides._len_torch_function_stack() == 0
    assert scope.census()["0/relu"].positions == 10 * 5
    (missing,) = scope.report().not_measured
    assert (missing.name, "several threads at once" in missing.reason) == ("(root)", True)


def test_after_an_interrupt_in_another_thread_functions_are_counted_in_this_one():
    def interrupt(module: nn.Module, args: object) -> None:
        raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(4, 6), Rectifying(), nn.Linear(6, 2))
    handle = model[2].register_forward_pre_hook(interrupt)
    with ns.watch(model) as scope:
        with concurrent.futures.ThreadPoolExecutor(1) as pool, pytest.raises(KeyboardInterrupt):
            pool.submit(plain, model, 0).result()
        handle.remove()
        scope.step()
        plain(model, 1).backward()
        scope.step()
    assert scope.census()["0/relu"].positions == 2 * 5
    assert torch.overrides._len_torch_function_stack() == 0


class Rectifying(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


def test_data_parallel_without_a_device_has_plain_names():
    watched, bare = Watched(), Watched()
    run(Case("", lambda: nn.DataParallel(mlp())), watched)
    run(Case("", mlp), bare)
    assert list(watched.scope.census()) == ["0/relu", "3/gelu"]
    for name, tally in bare.scope.census().items():
        assert watched.scope.census()[name].zero_outputs.tolist() == tally.zero_outputs.tolist()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_scripted_parts_are_reported_as_hidden_and_the_rest_is_counted():
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU())), nn.GELU())

    watched = Watched()
    assert_bits(run(Case("", build), Nobody())[0], run(Case("", build), watched)[0])
    assert list(watched.scope.census()) == ["2"]
    (missing,) = watched.scope.report().not_measured
    assert (missing.name, "scripted" in missing.reason) == ("1", True)


# Torch's own: it deprecates all of its quantisation.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor, torch.quantize_per_chan")
def test_a_model_quantised_after_training_is_counted():
    model = mlp().eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    x = data(0, 50, 4)
    with torch.no_grad(), ns.watch(quantised) as scope, scope.phase("val"):
        quantised(x)
    with torch.no_grad():
        zeros = (F.relu(quantised[0](x)) == 0).sum(0)
    assert 0 < zeros.sum() < zeros.numel() * 50
    assert scope.census("val")["1"].zero_outputs.tolist() == zeros.tolist()
    assert list(scope.census("val")) == ["1", "4"]


def test_a_weight_that_a_step_changes_in_place_is_a_weight_still() -> None:
    """As LBFGS does, which runs the model again in its step."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    with ns.watch(model) as scope:
        scope.open_step()
        for _ in range(2):
            x = torch.randn(5, 3)
            for module in model:
                x = module(x)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(x.mean())
        scope.close_step()
        scope.step()
    assert {name: tally.positions for name, tally in scope.census().items()} == {"0/relu": 10}
