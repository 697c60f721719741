"""Draw docs/images/continual-learning.png and print a table of docs/revive.md from docs/continual-learning.csv.

Run by hand: ``python -m scripts.draw_continual_learning``. The file is what ``python examples/continual_learning.py
--tasks 30 --seeds 0 1 2 --rules "Adam alone" Dead "Dead or dormant" ReDo SNR "Continual backprop"`` leaves: a line for
each rule, seed and task.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

from neuronscope.demo.picture import house_style
from neuronscope.writers.markdown_text import table

DOCS = Path(__file__).resolve().parent.parent / "docs"
DATA = DOCS / "continual-learning.csv"
PICTURE = DOCS / "images" / "continual-learning.png"
BLOCK = 5  # tasks

#: Each rule's words in the table, and its colour.
RULES = {
    "Adam alone": ("Adam alone", "#7a8790"),
    "Dead": ("`Dead()` after each task", "#0068aa"),
    "Dead or dormant": ("`ReDo(0.025)` after each task", "#008c69"),
    "ReDo": ("`ReDo(0.1)` every 1,000 steps", "#3b93c9"),
    "SNR": ("`SelfNormalizedResets(0.02)` at each step", "#d68c00"),
    "Continual backprop": ("`ContinualBackprop(1e-4)` every 50 steps", "#be1a24"),
}

#: Of each rule and seed: accuracy, dead share and number of revived neurons, by task.
Courses = dict[str, dict[int, list[tuple[float, float, int]]]]


def load(path: Path = DATA) -> Courses:
    """Read the file."""
    courses: Courses = {name: {} for name in RULES}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            course = courses[row["rule"]].setdefault(int(row["seed"]), [])
            course.append((float(row["accuracy"]), float(row["dead"]), int(row["revived"])))
            if len(course) != int(row["task"]):
                raise ValueError(f"{path.name} lacks a task of {row['rule']}, seed {row['seed']}")
    return courses


def blocks(values: Sequence[float]) -> list[float]:
    """Return the means over each five tasks."""
    return [statistics.fmean(values[start : start + BLOCK]) for start in range(0, len(values), BLOCK)]


def last_blocks(courses: Courses, rule: str) -> list[float]:
    """Return the accuracy of the last five tasks, by seed."""
    return [blocks([accuracy for accuracy, _, _ in course])[-1] for course in courses[rule].values()]


def markdown(courses: Courses) -> str:
    """Return the table: accuracy by block, the last one's smallest and largest seed, dead neurons, neurons revived."""
    tasks = max(len(course) for seeds in courses.values() for course in seeds.values())
    heads = ["", *(f"{start + 1}–{start + BLOCK}" for start in range(0, tasks, BLOCK))]
    heads += ["last block, by seed", "dead", "revived"]
    rows = []
    for rule, (words, _) in RULES.items():
        seeds = list(courses[rule].values())
        if not seeds:
            continue
        accuracy = zip(*(blocks([each[0] for each in course]) for course in seeds), strict=True)
        last = last_blocks(courses, rule)
        dead = statistics.fmean(blocks([each[1] for each in course])[-1] for course in seeds)
        revived = statistics.fmean(sum(each[2] for each in course) for course in seeds)
        rows.append(
            [
                words,
                *(_share(statistics.fmean(block)) for block in accuracy),
                f"{_share(min(last))} – {_share(max(last))}",
                f"{dead:.0%}".replace("%", " %"),
                f"{revived:,.0f}",
            ]
        )
    return table([(head, bool(place)) for place, head in enumerate(heads)], rows)


def _share(number: float) -> str:
    return f"{number:.3f}".removeprefix("0")


@house_style()
def draw(courses: Courses, path: Path = PICTURE) -> None:
    """Draw accuracy by block and dead neurons by task, each a line for the mean of the seeds and a band for all.

    Args:
        courses: What the file has.
        path: The picture's file.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(6.4, 9.6), dpi=150, layout=ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12))
    upper, lower = figure.subplots(2, 1)
    for rule, (words, colour) in RULES.items():
        seeds = list(courses[rule].values())
        if not seeds:
            continue
        for panel, column in ((upper, 0), (lower, 1)):
            lines = [[100 * each[column] for each in course] for course in seeds]
            places: list[float] = list(range(1, len(lines[0]) + 1))
            if panel is upper:
                lines, places = [blocks(line) for line in lines], blocks(places)
            at = list(zip(*lines, strict=True))
            panel.plot(places, [statistics.fmean(each) for each in at], color=colour, label=words.replace("`", ""))
            panel.fill_between(places, list(map(min, at)), list(map(max, at)), color=colour, alpha=0.18, linewidth=0)
    upper.set_title("accuracy in blocks of five tasks", fontsize=14, pad=10)
    lower.set_title("neurons that are dead at the end of a task", fontsize=14, pad=10)
    for panel in (upper, lower):
        panel.set_xlim(0, 31)
        panel.yaxis.set_major_formatter("{x:.0f} %")
        panel.tick_params(labelsize=13)
    lower.set_ylim(bottom=0)
    lower.set_xlabel("task", fontsize=14)
    figure.legend(*upper.get_legend_handles_labels(), loc="outside lower center", ncols=1, fontsize=12.5, frameon=False)
    figure.savefig(path, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})


def main() -> None:
    """Draw the picture and print the table."""
    courses = load()
    draw(courses)
    print(markdown(courses))


if __name__ == "__main__":
    main()
