"""`cohort report`: writes report.html from a run's folder, or a page that compares several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from rl.report.compare import compare_runs
from rl.report.report import build_report
from rl.report.shelf import PAGE_BYTES, SIDE_BYTES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run_dir", type=Path, nargs="+", help="the folder of a run; several are compared on one page")
    add("--out", type=Path, help="default: RUN/report.html; for several runs ./compare.html")
    on_page = "MiB of completions on the page itself; older ones go to a folder beside it (%(default)s)"
    add("--page-mb", type=int, default=PAGE_BYTES >> 20, help=on_page)
    beside = "MiB of that folder; still older completions are only in the ledger (%(default)s)"
    add("--side-mb", type=int, default=SIDE_BYTES >> 20, help=beside)


def run(arguments: argparse.Namespace) -> int:
    out = arguments.out and arguments.out.expanduser()
    run_dirs = [run_dir.expanduser() for run_dir in arguments.run_dir]
    if len(run_dirs) > 1:
        print(compare_runs(run_dirs, out or Path("compare.html")))
        return 0
    sizes = {"page_bytes": arguments.page_mb << 20, "side_bytes": arguments.side_mb << 20}
    print(build_report(run_dirs[0], out, **sizes))
    return 0
