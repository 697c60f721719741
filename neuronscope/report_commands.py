"""The commands ``neuronscope report``, ``diff`` and ``scan``: their arguments, and what they do."""

from __future__ import annotations

import argparse

from neuronscope.checkpoints.read_postmortem import read_either
from neuronscope.command_output import (
    EXIT_OK,
    add_check_option,
    add_output_options,
    check_dead,
    check_targets,
    fail,
    write_report,
)
from neuronscope.errors import UsageError
from neuronscope.report.comparison import compare_reports
from neuronscope.report.reading import read_report
from neuronscope.report.report import Report

__all__ = ["add_diff", "add_report", "add_scan"]

_DEAD = (
    "more than PCT percent of the observed neurons are dead, if a whole layer is dead, or if any gave NaN or infinity"
)


def add_report(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``report`` to a parser."""
    command = commands.add_parser(
        "report",
        help="show a report that was saved as JSON",
        description="Reads the JSON of a report or a post-mortem (report.to_json) and shows it, here and as a page. "
        "Loads no torch.",
    )
    command.add_argument("file", metavar="FILE", help="the report's JSON")
    add_output_options(command)
    add_check_option(command, _DEAD)
    command.set_defaults(call=_report)


def add_diff(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``diff`` to a parser."""
    command = commands.add_parser(
        "diff",
        help="compare two reports: which neurons died between them, and which revived",
        description="Reads the JSON of two reports on one network and shows, layer by layer, which neurons died and "
        "revived between them. Loads no torch.",
    )
    command.add_argument("before", metavar="BEFORE", help="the first report's JSON")
    command.add_argument("after", metavar="AFTER", help="the second report's JSON")
    add_output_options(command, ["html", "json"])
    add_check_option(command, "more than PCT percent of the compared neurons died, or if any gives NaN only since")
    command.set_defaults(call=_diff)


def add_scan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command ``scan`` to a parser."""
    command = commands.add_parser(
        "scan",
        help="run a trained model over data and report on its neurons",
        description="Runs a trained model over data, in evaluation mode, and reports on its neurons. A loss adds "
        "gradients. Modules in the current folder are found.",
    )
    command.add_argument("model", metavar="PKG.MOD:MODEL", help="the network, or a function that returns it")
    command.add_argument(
        "--data", metavar="PKG.MOD:DATA", required=True, help="batches, or a function that returns them"
    )
    command.add_argument("--loss", metavar="PKG.MOD:FN", help="a function loss(output, batch); adds gradients")
    add_output_options(command)
    add_check_option(command, _DEAD)
    command.set_defaults(call=_scan)


def _report(parsed: argparse.Namespace) -> int:
    check_targets(parsed)
    report = read_either(parsed.file)
    if isinstance(report, Report):
        return _show(report, parsed)
    write_report(report, parsed)
    return EXIT_OK if parsed.fail_above is None else check_dead(report, parsed.fail_above, report.not_finite)


def _scan(parsed: argparse.Namespace) -> int:
    from neuronscope.checkpoints.data.user_arguments import check_batches, resolve_batches, resolve_loss  # loads torch
    from neuronscope.checkpoints.model.load_model import load_trained
    from neuronscope.checkpoints.user_code import user_code
    from neuronscope.scanning import scan

    check_targets(parsed)
    model, batches, loss = load_trained(parsed.model), resolve_batches(parsed.data), resolve_loss(parsed.loss)
    with user_code(f"Expected the model ({parsed.model}) to run on the data ({parsed.data})"):
        report = scan(model, check_batches(() if batches is None else batches), loss)
    return _show(report, parsed)


def _show(report: Report, parsed: argparse.Namespace) -> int:
    write_report(report, parsed)
    if parsed.fail_above is None:
        return EXIT_OK
    few = f" (provisional: from {report.examples:,} of {report.examples_needed:,} examples)"
    not_finite = max(report.not_finite_neurons, int(report.not_finite > 0))
    return check_dead(report, parsed.fail_above, not_finite, few if report.provisional else "")


def _diff(parsed: argparse.Namespace) -> int:
    check_targets(parsed)
    found = compare_reports(read_report(parsed.before), read_report(parsed.after))
    if not found.layers:
        raise UsageError("Expected two reports on one network, but they have no layer of one name and width in common.")
    write_report(found, parsed)
    if parsed.fail_above is None:
        return EXIT_OK
    broken = sum(layer.broken for layer in found.layers)
    if broken:
        return fail(f"{broken:,} neurons give NaN or infinity since the first report.")
    if not found.compared:
        raise UsageError("Expected neurons to compare with --fail-above, but no neuron was observed in both reports.")
    if found.died_percent > parsed.fail_above:
        died = f"{found.died:,} of {found.compared:,} neurons ({found.died_percent:.4g} %) died"
        return fail(f"{died}, more than {parsed.fail_above:g} %.")
    return EXIT_OK
