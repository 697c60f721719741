"""Read a report: what is said of single neurons, how sure that is, when it happened, and how to use it in code.

A ReLU network learns scikit-learn's digits; for a moment its learning rate jumps, and neurons die of it. The rest of
the script reads the report part by part.

Output (shortened; numbers differ a little between machines)::

    1. The whole, in one line. Verdicts are of one window: the newest that has closed.
       57 of 320 neurons dead (17.8 %), window: steps 399 to 455
    2. Verdicts: one for each neuron that is not simply alive, with its sample size and how sure it is.
       {'dead': 57, 'dormant': 2}
       neuron 26 of site '0/relu': silent since step 244; in 1797 examples it did not fire, so it fires in fewer …
    3. Masks: numpy arrays over the neurons of a site, to prune, to reset or to look into.
       site '8/relu' (relu): dead [0, 7, 8, 9, 14, 22, 28, 31, 34, 35, 36, 37, 42, 54, 55, 59, 61, 62]
    4. History: one row a window, and the step at which each neuron died.
       up to step 170: 18 dead,  0 dormant
       up to step 227:  6 dead, 10 dormant
       up to step 284: 16 dead,  2 dormant
       ...
    5. Files: JSON for programs, markdown for a pull request, HTML for people.

In the middle of the jump (step 227) dead neurons come to life again for a while. Run it with::

    python examples/read_a_report.py [--out DIR]
"""

import argparse
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import neuronscope as ns


def train() -> ns.Report:
    """Train with a jump of the learning rate at steps 200 to 250, and watch; a window is one epoch of 57 steps."""
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    images, digits = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    model = nn.Sequential()
    for _ in range(5):
        model.append(nn.Linear(64, 64)).append(nn.ReLU())
    model.append(nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with ns.watch(model, window_steps=57) as scope:
        for _ in range(8):
            for batch in torch.randperm(len(digits)).split(32):
                optimizer.param_groups[0]["lr"] = 1e-2 if 200 <= scope.global_step < 250 else 1e-3
                F.cross_entropy(model(images[batch]), digits[batch]).backward()
                optimizer.step()
                optimizer.zero_grad()
                scope.step()
    return scope.report()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/read_a_report"), help="folder for the files")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # for matrices this small, more threads only wait for each other
    report = train()

    print("1. The whole, in one line. Verdicts are of one window: the newest that has closed.")
    window = f"steps {report.window.first_step} to {report.window.last_step}"
    print(f"   {report.dead} of {report.neurons} neurons dead ({report.dead_percent:.1f} %), window: {window}")

    print("\n2. Verdicts: one for each neuron that is not simply alive, with its sample size and how sure it is.")
    print("  ", dict(Counter(verdict.label for verdict in report.verdicts())))
    for verdict in islice((verdict for verdict in report.verdicts() if verdict.label == "dead"), 3):
        since = "never fired" if verdict.since == -1 else f"silent since step {verdict.since}"
        print(
            f"   neuron {verdict.neuron} of site {verdict.site!r}: {since}; in {verdict.examples} examples it did not "
            f"fire, so it fires in fewer than {verdict.bound:.2%} of them"
        )

    print("\n3. Masks: numpy arrays over the neurons of a site, to prune, to reset or to look into.")
    site = max(report.layers, key=lambda site: site.dead)
    print(f"   site {site.name!r} ({site.activation}): dead {site.judgement.dead.nonzero()[0].tolist()}")
    print(f"   most often silent of the rest: {site.zero_output_fraction[~site.judgement.dead].max():.1%} of positions")

    print("\n4. History: one row a window, and the step at which each neuron died.")
    for step, dead, dormant in zip(site.history.steps, site.history.dead, site.history.dormant, strict=True):
        print(f"   up to step {step:3}: {dead:2} dead, {dormant:2} dormant")
    died = site.history.died_step[site.history.died_step >= 0]
    if len(died):
        print(f"   the first died at step {died.min()}, the last at step {died.max()}")

    print("\n5. Files: JSON for programs, markdown for a pull request, HTML for people.")
    report.to_json(out / "report.json")
    report.to_html(out / "report.html")
    report.to_markdown(out / "report.md")
    print(f"   {out}/report.json, summary: {json.loads((out / 'report.json').read_text())['summary']}")


if __name__ == "__main__":
    main()
