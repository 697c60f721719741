"""A mixture of eight experts, of which one gets no token and one has dead neurons: what the report says of it.

A router sends each token to two experts. Before the training it is set to never choose expert 3, and 24 of the 64
neurons of expert 5 are killed by their bias. The page has a row for each expert, with its tokens and its neurons.

Output (numbers of tokens differ between machines)::

    24 of 448 neurons are dead (5.4 %).
    expert 0:  4,581 tokens,  0 dead
    expert 1:  3,733 tokens,  0 dead
    expert 2:  7,469 tokens,  0 dead
    expert 3:      0 tokens, unseen
    expert 4:  6,875 tokens,  0 dead
    expert 5:  9,505 tokens, 24 dead
    expert 6: 11,600 tokens,  0 dead
    expert 7:  7,437 tokens,  0 dead
    the page: runs/mixture_of_experts/report.html

Run it with::

    python examples/mixture_of_experts.py [--out DIR]
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import neuronscope as ns

EXPERTS, WIDTH, HIDDEN, STEPS, TOKENS = 8, 16, 64, 100, 256


class Mixture(nn.Module):
    """Tokens (T, 16) → (T, 16): each goes to the two experts that the router prefers."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH)) for _ in range(EXPERTS)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the experts' outputs, weighted and added."""
        weights, chosen = self.router(tokens).softmax(-1).topk(2)
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, place = (chosen == number).nonzero(as_tuple=True)
            output = output.index_add(0, token, weights[token, place, None] * expert(tokens[token]))
        return output


def train() -> ns.Report:
    """Train a mixture with an idle expert and dead neurons, and return the report on it."""
    torch.manual_seed(0)
    model = Mixture()
    with torch.no_grad():
        model.router.bias[3] = -100.0
        model.experts.get_parameter("5.0.bias")[:24] = -100.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with ns.watch(model) as scope:
        for _ in range(STEPS):
            tokens = torch.randn(TOKENS, WIDTH)
            F.mse_loss(model(tokens), tokens.roll(1, dims=1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            scope.step()
    return scope.report()


def main() -> None:
    parser = argparse.ArgumentParser(description="A mixture of experts with an idle expert and dead neurons.")
    parser.add_argument("--out", type=Path, default=Path("runs/mixture_of_experts"), help="folder for the page")
    folder = parser.parse_args().out
    torch.set_num_threads(1)
    report = train()
    print(f"{report.dead} of {EXPERTS * HIDDEN - HIDDEN} neurons are dead ({report.dead_percent:.1f} %).")
    for number in range(EXPERTS):
        expert = report[f"experts.{number}.0/relu"]
        dead = f"{expert.dead:2} dead" if expert.positions else "unseen"
        print(f"expert {number}: {expert.positions:6,} tokens, {dead}")
    folder.mkdir(parents=True, exist_ok=True)
    report.to_html(folder / "report.html")
    print(f"the page: {folder / 'report.html'}")


if __name__ == "__main__":
    main()
