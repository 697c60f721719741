"""Published numbers on dead neurons, measured again: theory and papers on the left, this library's counts on the right.

Each row trains nothing and needs no data: it draws many networks, runs them, and lets :func:`neuronscope.scan` count.
Ten thousand small networks run as one module whose layers are stacks of matrices; with the stack declared as the neuron
axis, a "neuron" that is dead is a network whose whole layer is zero for every input.

Output::

    share of nets (neurons) dead or dormant           published  measured   nets
    Lu 2019: 2 layers of 2, one input                    0.4375    0.4429  10000
    Lu 2019: 9 layers of 2, one input                    0.9249    0.9247  10000
    Lu 2019: 9 layers of 3, one input                    0.6993    0.7005  10000
    Lu 2019: 9 layers of 5, one input                    0.2485    0.2479  10000
    Lu 2019: 9 layers of 10, one input                   0.0088    0.0095  10000
    Lu 2019: 49 layers of 5, one input                   0.7890    0.7785  10000
    Lu 2019: 9 layers of 2, every input                  0.8800    0.8778  10000
    Lu 2019: 9 layers of 3, every input                  0.5780    0.5785  10000
    Lu 2019: 9 layers of 5, every input                  0.1290    0.1277  10000
    Lu 2019: 9 layers of 2, RAI initialization           0.2350    0.2302  10000
    Lu 2019: 9 layers of 3, RAI initialization           0.0630    0.0618  10000
    Lu 2019: 9 layers of 5, RAI initialization           0.0040    0.0056  10000
    2412.06829: unit over 1 over 1, all of R^1           0.2500    0.2511  10000
    2412.06829: unit over 2 over 2, all of R^2           0.1250    0.1225  10000
    2412.06829: unit over 2 over 1, all of R^1           0.1875    0.1903  10000
    2412.06829: unit over 3 over 2, all of R^2           0.0781    0.0805  10000
    Sokar 2023: score at most 0.1                        0.5090    0.5090  10000
    Sokar 2023: score at most 0.025                      0.3585    0.3585  10000
    Clopper-Pearson: silent at the 95 % bound            0.0500    0.0497  10000

In 10,000 nets chance moves a share of a half by 0.005, and one of a twentieth by 0.002. Sources: Lu, Shin, Su and
Karniadakis 2019, "Dying ReLU and Initialization"; arXiv 2412.06829 (units dead on all of
R^n); Sokar et al. 2023, "The Dormant Neuron Phenomenon" (ReDo); the exact one-sided bound of Clopper and Pearson 1934.
Run it with::

    python examples/published_numbers.py
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import neuronscope as ns

NETS = 10_000


class Stack(nn.Module):
    """Many networks at once: weights are (networks, outputs, inputs), data are (positions, networks, features)."""

    def __init__(self, layers: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weight for weight, _ in layers)
        self.biases = nn.ParameterList(bias for _, bias in layers)
        self.activations = nn.ModuleList(nn.ReLU() for _ in layers)

    def forward(self, x: Tensor) -> Tensor:
        """(positions, networks, features) → the same, of the last layer."""
        for weight, bias, activation in zip(self.weights, self.biases, self.activations, strict=True):
            x = activation(torch.einsum("pni,noi->pno", x, weight) + bias)
        return x


def he(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    return torch.randn(NETS, outputs, inputs) * math.sqrt(2 / inputs), torch.zeros(NETS, outputs)


def symmetric(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    return torch.randn(NETS, outputs, inputs), torch.randn(NETS, outputs)


def rai(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Randomized asymmetric initialization: of each unit's weights and bias, one is drawn from Beta(2, 1)."""
    drawn = torch.randn(NETS, outputs, inputs + 1) * 0.6007 / math.sqrt(inputs)
    positive = torch.distributions.Beta(2.0, 1.0).sample((NETS, outputs, 1))
    drawn.scatter_(2, torch.randint(inputs + 1, (NETS, outputs, 1)), positive)
    return drawn[..., :-1].contiguous(), drawn[..., -1].contiguous()


def dead_share(widths: list[int], inputs: Tensor, draw: Callable[[int, int], tuple[Tensor, Tensor]]) -> float:
    """Share of networks in which some layer is zero for every row of ``inputs``."""
    net = Stack([draw(*sizes) for sizes in zip([inputs.shape[1], *widths], widths, strict=False)])
    report = ns.scan(net, inputs[:, None].expand(-1, NETS, -1), axes={"*": 1})
    dead = torch.stack([torch.from_numpy(site.judgement.dead) for site in report.layers]).any(dim=0)
    return float(dead.double().mean())


def rows() -> Iterator[tuple[str, float, float]]:
    """What it is, the share that was published, and the share that is counted here."""
    torch.manual_seed(0)
    for depth, width in ((2, 2), (9, 2), (9, 3), (9, 5), (9, 10), (49, 5)):
        born = 1 - (1 - 2**-width) ** depth  # a layer is all zero with probability 2^-width, by symmetry
        measured = dead_share([width] * depth, torch.ones(1, 1), he)
        yield f"Lu 2019: {depth} layers of {width}, one input", born, measured
    both = torch.tensor([[1.0], [-1.0]])  # without biases every other input is as one of these
    for width, born in ((2, 0.880), (3, 0.578), (5, 0.129)):
        measured = dead_share([width] * 9, both, he)
        yield f"Lu 2019: 9 layers of {width}, every input", born, measured
    for width, born in ((2, 0.235), (3, 0.063), (5, 0.004)):
        measured = dead_share([width] * 9, torch.linspace(-math.sqrt(3), math.sqrt(3), 33)[:, None], rai)
        yield f"Lu 2019: 9 layers of {width}, RAI initialization", born, measured
    for n0, n1 in ((1, 1), (2, 2), (1, 2), (2, 3)):
        born = 2.0 ** -(n1 + 1) if n1 <= n0 else (2**n0 + 1) / 4 ** (n0 + 1)
        far = torch.randn(1000, n0) * 10 ** torch.empty(1000, 1).uniform_(-1, 3)
        last = ns.scan(Stack([symmetric(n0, n1), symmetric(n1, 1)]), far[:, None].expand(-1, NETS, -1), axes={"*": 1})
        measured = float(last.layers[1].judgement.dead.mean())
        yield f"2412.06829: unit over {n1} over {n0}, all of R^{n0}", born, measured
    # From here on neurons are neurons, and a share is one of them.
    scale = torch.logspace(-4, 0, NETS)  # E|relu(scale · N(0, 1))| is in proportion to the scale
    linear = nn.Linear(1, NETS, bias=False)
    linear.weight.data.copy_(scale[:, None])
    layer = nn.Sequential(linear, nn.ReLU())
    for tau in (0.1, 0.025):
        dormant = float((scale / scale.mean() <= tau).double().mean())
        report = ns.scan(layer, torch.randn(500, 1), policy=ns.Policy(dormant_tau=tau))
        yield f"Sokar 2023: score at most {tau}", dormant, float(report["0/relu"].judgement.tau_dormant.mean())
    rare = nn.Sequential(nn.Identity(), nn.ReLU())
    fires = (torch.rand(1000, NETS) < 0.002991).float()  # as often as silence in 1000 examples leaves possible at 95 %
    report = ns.scan(rare, fires)
    yield "Clopper-Pearson: silent at the 95 % bound", 0.05, float(report["1"].judgement.dead.mean())


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'share of nets (neurons) dead or dormant':48}  published  measured   nets")
    for what, published, measured in rows():
        print(f"{what:48}  {published:9.4f} {measured:9.4f}  {NETS:5}", flush=True)


if __name__ == "__main__":
    main()
