"""Feed-forward layers of a small transformer: which kind learns best, and which leaves neurons dead, silent or dormant?

One character-level language model reads Python's own reference manual (the texts behind ``help()``) with six kinds of
feed-forward layers of equal parameters: ReLU, ReLU², GELU, SiLU, GEGLU and SwiGLU. A gated layer has three matrices
instead of two, so its width is two thirds. All kinds see the same batches. Losses and verdicts are of paragraphs
that training does not see. A gated unit's neuron is the *product* act(gate) · up that the next layer reads:
Neuronscope watches that product beside its gate, although no module stands for it, and totals count both as one neuron.

Output (numbers differ a little between machines and versions of Python)::

    ReLU    loss 2.693; of  768 neurons  36 dead, 0 silent,  67 dormant
    ReLU²   loss 2.633; of  768 neurons  35 dead, 0 silent, 126 dormant
    GELU    loss 2.691; of  768 neurons   0 dead, 0 silent,   0 dormant
    SiLU    loss 2.850; of  768 neurons   0 dead, 0 silent,   0 dormant
    GEGLU   loss 2.661; of  510 neurons   0 dead, 0 silent,   0 dormant
    SwiGLU  loss 2.683; of  510 neurons   0 dead, 0 silent,   0 dormant

This is one seed, a high learning rate and hardly any training. Longer trainings of three seeds, by layer, and what to
make of them, are in docs/transformer-feedforward.md. Run it with::

    python examples/transformer_feedforward.py
"""

from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neuronscope as ns

LAYERS, WIDTH, HEADS, CONTEXT, BATCH, CHARACTERS = 3, 64, 4, 64, 8, 128


class SquaredReLU(nn.Module):
    """``relu(x)²``: no activation of torch, so ``ns.watch`` is told of it."""

    def forward(self, x: Tensor) -> Tensor:
        """``(…)`` → ``(…)``."""
        return F.relu(x).square()


KINDS = {"ReLU": nn.ReLU, "ReLU²": SquaredReLU, "GELU": nn.GELU, "SiLU": nn.SiLU, "GEGLU": nn.GELU, "SwiGLU": nn.SiLU}


class FeedForward(nn.Module):
    """Linear, activation, linear; a gated one has a second linear layer beside the gate."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        hidden = 8 * WIDTH // 3 if kind.endswith("GLU") else 4 * WIDTH
        self.gate, self.act, self.down = nn.Linear(WIDTH, hidden), KINDS[kind](), nn.Linear(hidden, WIDTH)
        self.up = nn.Linear(WIDTH, hidden) if kind.endswith("GLU") else None

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, WIDTH)`` → ``(B, T, WIDTH)``; the neurons are on the last axis."""
        gate = self.act(self.gate(x))
        return self.down(gate if self.up is None else gate * self.up(x))


class Block(nn.Module):
    """Attention to what came before, and a feed-forward layer, each behind a layer norm."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out, self.ff = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), FeedForward(kind)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, T, WIDTH)`` → ``(B, T, WIDTH)``."""
        q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, 2))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.ff(self.norms[1](x))


class Embedding(nn.Module):
    """What a character is, and where it stands."""

    def __init__(self) -> None:
        super().__init__()
        self.character, self.position = nn.Embedding(CHARACTERS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        for table in (self.character, self.position):
            nn.init.normal_(table.weight, std=0.1)  # torch's 1.0 drowns what the first blocks add

    def forward(self, x: Tensor) -> Tensor:
        """``(B, CONTEXT)`` → ``(B, CONTEXT, WIDTH)``."""
        return self.character(x) + self.position.weight


def read_manual() -> tuple[Tensor, Tensor]:
    """Return the characters to train on, ``(C,)``, and every tenth paragraph's in windows, ``(N, CONTEXT + 1)``."""
    pages = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = list(dict.fromkeys(pages.split("\n\n")))  # once each: many stand on several pages
    number = {character: place for place, character in enumerate(sorted(set(pages)))}
    kept = (paragraph for place, paragraph in enumerate(paragraphs) if place % 10 != 5)
    texts = ("\n\n".join(part) for part in (kept, paragraphs[5::10]))
    train, held_out = (torch.tensor([number[character] for character in text]) for text in texts)
    return train, held_out.unfold(0, CONTEXT + 1, CONTEXT)


def train(kind: str, seed: int, steps: int, lr: float, text: Tensor, held_out: Tensor) -> tuple[float, ns.Report]:
    """Train a model; return its mean loss on the held-out paragraphs, and the report on its neurons there."""
    torch.manual_seed(seed)
    blocks = [Block(kind) for _ in range(LAYERS)]
    model = nn.Sequential(Embedding(), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHARACTERS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.1)
    places = torch.Generator().manual_seed(seed)

    def loss_of(batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    with ns.watch(model, every_n_steps=20, activations={SquaredReLU: "relu-like"}) as scope:
        for _ in range(steps):
            starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=places)
            loss_of(text[starts + torch.arange(CONTEXT + 1)]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            scope.step()
        total = torch.zeros(())
        with scope.phase("val"):  # with gradients, which tell a silent neuron from a dead one
            for batch in held_out.split(BATCH):
                loss = loss_of(batch)
                loss.backward()
                total += loss.detach() * len(batch)
    return total.item() / len(held_out), scope.report("val")


def main() -> None:
    torch.set_num_threads(1)  # quicker for networks this small
    pages = read_manual()
    for kind in KINDS:
        loss, report = train(kind, 0, 60, 1e-2, *pages)
        counts = f"{report.dead:3} dead, {report.silent} silent, {report.dormant:3} dormant"
        print(f"{kind:7} loss {loss:.3f}; of {report.neurons:4} neurons {counts}")


if __name__ == "__main__":
    main()
