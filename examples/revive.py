"""Make dead neurons learn again: a network that learns one task after another, left alone and revived.

Each task shows scikit-learn's digits once, with their pixels in an order of its own. The accuracy is that on each batch
before the network learns it; the learning rate is too high, as it happens. Left alone, more neurons are dead from task
to task. Revived, dead neurons get fresh incoming weights after each task, and outgoing weights of zero: on the examples
of the window they add to the output what they added before, nothing.

Output (shortened; numbers differ a little between machines)::

    left alone
      task  4: accuracy 73.7%, 53 of 200 neurons dead
      task  8: accuracy 22.7%, 85 of 200 neurons dead
      task 12: accuracy 41.6%, 92 of 200 neurons dead
    revived
      task  4: accuracy 81.2%, 26 of 200 neurons dead
      task  8: accuracy 79.2%, 36 of 200 neurons dead
      task 12: accuracy 61.9%, 35 of 200 neurons dead
      step 1344, Dead(): 1 of 0/relu
      step 1344, Dead(): 34 of 2/relu

Run it with::

    python examples/revive.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import neuronscope as ns

TASKS, BATCH = 12, 16


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """1797 images of 8 × 8 pixels, standardised, and the digits that they show."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32)
    return (images - images.mean()) / images.std(), torch.tensor(labels)


def learn(*, revives: bool) -> None:
    """Learn all tasks, and print the accuracy and the dead neurons of some."""
    torch.manual_seed(0)
    images, labels = digits()
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scope = ns.watch(model, every_n_steps=4, window_steps=len(images) // BATCH)
    for task in range(1, TASKS + 1):
        pixels, order = torch.randperm(64), torch.randperm(len(images))
        right = 0
        for batch in order[: len(order) // BATCH * BATCH].split(BATCH):
            logits = model(images[batch][:, pixels])
            right += int((logits.argmax(1) == labels[batch]).sum())
            F.cross_entropy(logits, labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            scope.step()
        if revives:
            ns.revive(scope, optimizer)  # between two steps
        else:
            scope.close_window()
        if task % 4 == 0:
            report = scope.report()
            accuracy = right / len(images)
            print(f"  task {task:2}: accuracy {accuracy:.1%}, {report.dead} of {report.neurons} neurons dead")
    for act in scope.acts[-2:]:
        print(f"  step {act.step}, {act.rule}: {len(act.neurons)} of {act.site}")
    scope.detach()


def main() -> None:
    torch.set_num_threads(1)  # for matrices this small, more threads only wait for each other
    print("left alone")
    learn(revives=False)
    print("revived")
    learn(revives=True)


if __name__ == "__main__":
    main()
