"""The command ``megatron-elva``. A subcommand is imported when it runs, so others work without its needs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: words after the command's name; None: those of this process.

    Returns:
        The exit code of the process.

    Raises:
        SystemExit: with 2, for words that are not understood.
    """
    parser = argparse.ArgumentParser(prog="megatron-elva", description="Training system for ELVA.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_doctor(commands)
    options = parser.parse_args(argv)
    return int(options.run(options))


def _add_doctor(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    about = "list GPU, driver, libraries, Slurm and known clashes, with remedies"
    parser = commands.add_parser("doctor", help=about, description=f"{about[0].upper()}{about[1:]}.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds for each probe (default 90)")
    parser.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from megatron_elva.doctor import report

    try:
        found = report.examine(options.timeout or report.TIMEOUT_S)
    except KeyboardInterrupt:
        return 130
    print(report.as_json(found) if options.json else report.as_text(found))
    return 1 if found.bad else 0
