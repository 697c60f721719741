"""Compare kinds of feed-forward layers in a transformer, and write docs/transformer-feedforward.md with its table.

    python -m scripts.feedforward_kinds --measure    # train what the page's file lacks: about 15 minutes of one core
    python -m scripts.feedforward_kinds              # write the page from docs/transformer-feedforward.csv

The models, the text and the training are those of examples/transformer_feedforward.py. Each training is a line of the
file as soon as it is done, so a measurement that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.tables import wrapped
from examples.transformer_feedforward import BATCH, CONTEXT, KINDS, LAYERS, FeedForward, read_manual, train
from neuronscope.writers.formatting import listed
from scripts.cost_of_death import interval, markdown_table, spread

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "docs" / "transformer-feedforward.csv"
PAGE = DATA.with_suffix(".md")
STEPS, SEEDS, LEARNING_RATE = 700, 3, 5e-3
FIELDS = ("kind", "seed", "loss", "dead", "silent", "dormant")


def measure_missing(path: Path = DATA) -> None:
    """Train what the file lacks and add each training to it."""
    torch.set_num_threads(1)
    text, held_out = read_manual()
    done = set()
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            done = {tuple(row[:2]) for row in csv.reader(file)}
    with path.open("a", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        if not done:
            lines.writerow(FIELDS)
        for seed in range(SEEDS):
            for kind in KINDS:
                if (kind, str(seed)) not in done:
                    loss, report = train(kind, seed, STEPS, LEARNING_RATE, text, held_out)
                    products = [site for site in report.layers if site.kind == "gated"]
                    counts = ([getattr(site, name) for site in products or report.layers] for name in FIELDS[3:])
                    lines.writerow([kind, seed, f"{loss:.4f}", *(" ".join(map(str, each)) for each in counts)])
                    file.flush()


class Trained(NamedTuple):
    """Hold one training.

    Attributes:
        loss: Loss on the held-out paragraphs, in nats a character.
        dead: Dead neurons of each layer there.
        silent: Silent neurons.
        dormant: Dormant neurons.
    """

    loss: float
    dead: tuple[int, ...]
    silent: tuple[int, ...]
    dormant: tuple[int, ...]


#: The trainings of each kind, by seed.
Found = dict[str, list[Trained]]


def load(path: Path = DATA) -> Found:
    """Read the file."""
    found: Found = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            dead, silent, dormant = (tuple(map(int, row[name].split())) for name in FIELDS[3:])
            found.setdefault(row["kind"], []).append(Trained(float(row["loss"]), dead, silent, dormant))
    return found


def less_than_relu(found: Found, kind: str) -> list[float]:
    """Return by how much a kind's loss is below ReLU's, for each seed."""
    return [relu.loss - it.loss for it, relu in zip(found[kind], found["ReLU"], strict=True)]


def loss_table(found: Found) -> str:
    """Return the table of losses and of neurons in all layers, means over the seeds."""
    rows = []
    for kind in KINDS:
        trained = found[kind]
        counts = [
            f"{statistics.fmean(sum(getattr(it, label)) for it in trained):.3g}"
            for label in ("dead", "silent", "dormant")
        ]
        less = "–" if kind == "ReLU" else spread(less_than_relu(found, kind), 3)
        rows.append([kind, spread([it.loss for it in trained], 3), less, *counts, f"{neurons(kind):,}"])
    return markdown_table(["feed-forward", "loss", "below ReLU's", "dead", "silent", "dormant", "of"], rows)


def neurons(kind: str) -> int:
    """Return the number of neurons of all feed-forward layers of a model."""
    return LAYERS * FeedForward(kind).gate.out_features


def layer_table(found: Found) -> str:
    """Return the table of dead, silent and dormant neurons by layer, means over the seeds."""
    rows = []
    for kind in KINDS:
        layers = zip(*(zip(it.dead, it.silent, it.dormant, strict=True) for it in found[kind]), strict=True)
        cells = [" · ".join(f"{statistics.fmean(label):.3g}" for label in zip(*seeds, strict=True)) for seeds in layers]
        rows.append([kind, *cells])
    return markdown_table(["dead · silent · dormant", *(f"layer {number}" for number in range(1, LAYERS + 1))], rows)


def told_apart(found: Found) -> list[str]:
    """Return the kinds whose loss differs from ReLU's by more than chance explains (95 %)."""
    intervals = {kind: interval(less_than_relu(found, kind)) for kind in KINDS if kind != "ReLU"}
    return [kind for kind, (low, high) in intervals.items() if low > 0 or high < 0]


def finding(found: Found) -> str:
    """Return what the losses say: how far kinds lie apart, and how far seeds."""
    means = {kind: statistics.fmean(it.loss for it in found[kind]) for kind in KINDS}
    best, worst = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    of_seeds = statistics.fmean(statistics.stdev(it.loss for it in found[kind]) for kind in KINDS)
    of_differences = statistics.fmean(statistics.stdev(less_than_relu(found, kind)) for kind in KINDS if kind != "ReLU")
    apart = told_apart(found)
    return wrapped(
        f"From the best ({best}) to the worst ({worst}) are {means[worst] - means[best]:.3f} nats, "
        f"{100 * (means[worst] / means[best] - 1):.1f} % of the loss. Seeds of one kind deviate by {of_seeds:.3f}, "
        f"differences from ReLU with the same seed by {of_differences:.3f}. Beyond chance (Student's t for each kind, "
        f"95 %, {SEEDS} seeds) {listed(apart, 5) or 'none'} {'differs' if len(apart) == 1 else 'differ'} from ReLU."
    )


def faq_row(found: Found) -> str:
    """Return the row of the FAQ's table of networks."""
    losses = {kind: f"{statistics.fmean(it.loss for it in found[kind]):.2f}" for kind in KINDS}
    dead = statistics.fmean(sum(it.dead) for it in found["ReLU"])
    return (
        f"| a small transformer, ReLU feed-forward | {dead:.3g} of {neurons('ReLU')} | loss {losses['ReLU']}; GELU "
        f"{losses['GELU']}; GEGLU {losses['GEGLU']} | [transformer-feedforward.md](transformer-feedforward.md) |"
    )


TEXT = """\
# Feed-forward layers in a transformer

<!-- Written by scripts/feedforward_kinds.py from transformer-feedforward.csv. Do not edit. -->

Which activation is best in a transformer's feed-forward layers, and do dead neurons decide it? One
small language model ({blocks} layers, 64 wide) reads Python's reference manual, character by character,
with six kinds of feed-forward of equal parameters: 256 neurons with ReLU, ReLU², GELU or SiLU, or
170 gated ones with GEGLU or SwiGLU. {seeds} seeds, {steps} steps of AdamW with warm-up and cosine, a highest
learning rate of {rate:g}. All kinds of a seed see the same batches.

Loss (nats a character) and neurons are of every tenth paragraph, which training does not see. ± is
the deviation over seeds; *below ReLU's* is by how much a kind's loss is lower than that of ReLU
with the same seed; neurons are means over the seeds. A gated unit is judged by its product. The
model is that of [transformer_feedforward.py](../examples/transformer_feedforward.py). Each training
is a line of `transformer-feedforward.csv` beside this page;
`python -m scripts.feedforward_kinds --measure` trains those that the file lacks, all if there is
none.

{losses}

{finding}

Dead, silent and dormant neurons by layer:

{layers}

## What to make of it

- **Death decides nothing here.** Of the {relu_neurons} ReLUs {dead_relu} are dead at the end. SiLU, of whose
  neurons none is dead or dormant, learns more slowly than ReLU; and ReLU², which gives zero
  wherever ReLU does, learns faster than GELU.
- **Gated layers learn fastest** at equal parameters, although they have a third fewer neurons.
  Published comparisons find the same after long training, with smaller gaps (Shazeer, *GLU Variants
  Improve Transformer*, 2020).
- **How soon is not how far.** {steps} steps of {tokens} characters are the beginning of a training. The
  table says which kind gets on sooner, in one small model, on one text, at one learning rate that
  was tuned for none of them. A gap between two kinds that is not much wider than the seeds' spread
  says nothing.

At a higher learning rate (0.01) some ReLUs are dead after 60 steps: the
[example](../examples/transformer_feedforward.py) shows that in a minute.
"""


def page(found: Found) -> str:
    """Return the page."""
    dead = statistics.fmean(sum(it.dead) for it in found["ReLU"])
    return TEXT.format(
        blocks=LAYERS,
        seeds=SEEDS,
        steps=STEPS,
        rate=LEARNING_RATE,
        tokens=BATCH * CONTEXT,
        losses=loss_table(found),
        finding=finding(found),
        layers=layer_table(found),
        dead_relu="none" if dead == 0 else f"{dead:.3g}",
        relu_neurons=neurons("ReLU"),
    )


def main() -> int:
    """Measure what is missing if asked to, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true", help="train what the file lacks first")
    if parser.parse_args().measure:
        measure_missing()
    PAGE.write_text(page(load()), encoding="utf-8")
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
