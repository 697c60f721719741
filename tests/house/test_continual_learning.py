"""What docs/revive.md says of continual learning is in its file, and the example learns with every rule."""

from __future__ import annotations

import statistics

import torch

from examples.continual_learning import WAYS, learn
from scripts import draw_continual_learning
from scripts.draw_continual_learning import DOCS, RULES, last_blocks

FILE = draw_continual_learning.load()
PAGE = (DOCS / "revive.md").read_text(encoding="utf-8")


def test_the_page_has_the_table_of_the_file() -> None:
    assert set(RULES) == set(WAYS)
    assert draw_continual_learning.markdown(FILE) in PAGE
    assert {len(course) for seeds in FILE.values() for course in seeds.values()} == {30}
    assert all(set(seeds) == {0, 1, 2} for seeds in FILE.values())


def test_what_the_page_says_in_words_holds() -> None:
    adam, dead, dormant = (last_blocks(FILE, rule) for rule in ("Adam alone", "Dead", "Dead or dormant"))
    assert max(adam) < 0.77 < 0.81 < min(dead)
    assert statistics.fmean(dormant) > 0.83
    first = {
        rule: [statistics.fmean(accuracy for accuracy, _, _ in course[:5]) for course in FILE[rule].values()]
        for rule in ("Adam alone", "Dead", "Dead or dormant")
    }
    for rule in ("Dead", "Dead or dormant"):
        assert 0 < statistics.fmean(first[rule]) - statistics.fmean(first["Adam alone"]) < 0.01
    assert min(first["Dead"]) < max(first["Adam alone"])


def test_the_example_learns_with_every_rule() -> None:
    chance = torch.Generator().manual_seed(0)
    data = torch.randn(640, 12, generator=chance), torch.randint(3, (640,), generator=chance)
    revived = {}
    for name, way in WAYS.items():
        tasks = list(learn(way, data, 3, seed=0))
        assert len(tasks) == 3
        assert all(0 < task.accuracy < 1 and 0 <= task.dead <= 1 for task in tasks)
        revived[name] = sum(task.revived for task in tasks)
    assert revived["Adam alone"] == 0 < revived["SNR"]
