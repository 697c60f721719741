"""Feed-forward layers of a small transformer: which kind leaves neurons dead or dormant, layer by layer?

The same character-level language model reads Python's own reference manual (the texts behind ``help()``) with ReLU,
GELU and SwiGLU feed-forwards, at a learning rate that is too high. SwiGLU's neuron is the *product* silu(gate) · up
that the next layer reads: Neuronscope watches that product beside its gate, although no module stands for it, and
totals count the two as one neuron.

Output (shortened; numbers differ a little between machines and versions of Python)::

    ReLU: loss 2.49 after 150 steps; 19 of 1024 neurons dead
      1.ff.gate/relu    axis 2  dead   0  dormant   0  of 256;  65.7% of outputs are zero
      2.ff.gate/relu    axis 2  dead   1  dormant  15  of 256;  87.4% of outputs are zero
      ...
    GELU: loss 2.47 after 150 steps; 0 of 1024 neurons dead
      ...
    SwiGLU: loss 2.47 after 150 steps; 0 of 1024 neurons dead
      ...
      4.ff.gate/silu    axis 2  dead   0  dormant   0  of 256;   0.0% of outputs are zero
      4.ff.gate/swiglu  axis 2  dead   0  dormant   0  of 256;   0.0% of outputs are zero

Nine of ten zeros in a ReLU layer are not nine of ten neurons dead: most of them fire at times. Run it with::

    python examples/transformer_feedforward.py
"""

import argparse
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neuronscope as ns

LAYERS, WIDTH, HIDDEN, HEADS, CONTEXT = 4, 64, 256, 4, 64


class FeedForward(nn.Module):
    """Linear, activation, linear; SwiGLU has a second linear layer beside the gate."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.gate = nn.Linear(WIDTH, HIDDEN)
        self.up = nn.Linear(WIDTH, HIDDEN) if kind == "SwiGLU" else None
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, WIDTH)`` → ``(B, T, WIDTH)``; the neurons are on the last axis."""
        if self.up is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down((F.relu if self.kind == "ReLU" else F.gelu)(self.gate(x)))


class Block(nn.Module):
    """Attention to what came before, and a feed-forward layer, each behind a layer norm."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.ff = FeedForward(kind)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, WIDTH)`` → ``(B, T, WIDTH)``."""
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, 2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.ff(self.norms[1](x))


def language_model(kind: str, characters: int) -> nn.Module:
    """Characters' numbers ``(B, T)`` → scores of the next character ``(B, T, characters)``."""
    torch.manual_seed(0)
    blocks = [Block(kind) for _ in range(LAYERS)]
    return nn.Sequential(nn.Embedding(characters, WIDTH), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters))


def main() -> None:
    torch.set_num_threads(1)  # quicker for networks this small
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of each model")
    steps = parser.parse_args().steps
    letters = "\n".join(topics[name] for name in sorted(topics))
    alphabet = {letter: number for number, letter in enumerate(sorted(set(letters)))}
    text = torch.tensor([alphabet[letter] for letter in letters])

    for kind in ("ReLU", "GELU", "SwiGLU"):
        model = language_model(kind, len(alphabet))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        places = torch.Generator().manual_seed(1)
        with ns.watch(model, window_steps=25) as scope:
            for _ in range(steps):
                starts = torch.randint(len(text) - CONTEXT - 1, (32, 1), generator=places)
                batch = text[starts + torch.arange(CONTEXT + 1)]
                loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                scope.step()
        report = scope.report()
        print(f"\n{kind}: loss {loss.item():.2f} after {steps} steps; {report.dead} of {report.neurons} neurons dead")
        for site in report.layers:
            zeros = site.zero_output_fraction.mean()
            print(
                f"  {site.name:17} axis {site.axis}  dead {site.dead:3}  dormant {site.dormant:3}"
                f"  of {site.neurons}; {zeros:6.1%} of outputs are zero"
            )


if __name__ == "__main__":
    main()
