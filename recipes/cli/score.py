"""`cohort score`: grades the rows of a JSON-lines file with one reward, or a run's completions again."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from recipes.cli.command import say_fault
from rewards.compose import RewardSpec
from rewards.pool.pool import RewardPool
from rewards.score import (
    add_deadline,
    check_rows,
    read_rows,
    result,
    score_rows,
    summary,
    take_flags_anywhere,
)
from rl.config.read import load_config
from rl.store.ledger import Ledger
from rl.types import Reward

Graded = Iterator[tuple[Any, Reward, dict[str, Any]]]
NUM_SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Grade rows of a file, or a run's completions again; print results and a summary."
    parser.add_argument("name", help="a reward: built-in name, entry point or module:callable")
    parser.add_argument(
        "file",
        type=Path,
        help="JSON lines with `completion` and the columns of the reward; or the folder of a run",
    )
    parser.add_argument(
        "options", nargs="*", metavar="key=value", help="options of the reward, values as JSON"
    )
    parser.add_argument("--out", type=Path, help="file for results (default: stdout; the summary to stderr)")
    parser.add_argument(
        "--workers", type=int, default=max(1, min(8, os.cpu_count() or 1)), help="grader processes"
    )
    add_deadline(parser)
    parser.add_argument("--memory-gib", type=float, default=2.0, help="address space of one grader")
    parser.add_argument(
        "--chat", action="store_true", help="pass completions as messages, as TRL's rewards want"
    )
    take_flags_anywhere(parser)


def run(args: argparse.Namespace) -> int:
    """Grades and prints; returns 1 if graders failed on more than 5 % of the rows, else 0.

    Raises:
        ValueError: the file, a row, the reward or an option is wrong.
    """
    with ExitStack() as stack:
        pool = RewardPool(
            [RewardSpec(args.name, options=read_options(args.options) or _options_of_run(args))],
            workers=args.workers,
            deadline_s=args.deadline,
            memory_bytes=int(args.memory_gib * (1 << 30)),
        )
        stack.callback(pool.close)
        if not args.file.is_dir():
            check_rows(pool, read_rows(args.file))
        out = sys.stdout if args.out is None else stack.enter_context(args.out.open("w"))
        rewards, pairs, start = [], [], time.monotonic()
        found = _of_run(pool, args) if args.file.is_dir() else _of_file(pool, args)
        for row_id, reward, extra in found:
            rewards.append(reward)
            pairs += [(row_id, reward, extra["run"])] if extra else []
            out.write(json.dumps(result(row_id, reward) | extra) + "\n")
        seconds = time.monotonic() - start
        if not rewards:
            raise ValueError(f"{args.file} has no " + ("ledger" if args.file.is_dir() else "rows"))
        to = sys.stderr if args.out is None else sys.stdout
        print(summary(rewards, seconds), *agreement(pairs), pool.faults, sep="\n", file=to)
        return int(pool.faults.share > 0.05)


def read_options(words: Iterable[str]) -> dict[str, Any]:
    """Options from `key=value` words; a value that is not JSON is a string.

    Raises:
        ValueError: a word has no "=".
    """
    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"option {word!r} must look like key=value, such as max_length=1024")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def _of_file(pool: RewardPool, args: argparse.Namespace) -> Graded:
    for row_id, reward in score_rows(pool, read_rows(args.file), chat=args.chat):
        yield row_id, reward, {}


def _of_run(pool: RewardPool, args: argparse.Namespace) -> Graded:
    """Each recorded completion graded again, with the run's score: the part of that name, or the reward."""
    ledger = Ledger(args.file)
    for step in ledger.sample(sys.maxsize):
        asked = [group.group for group in step.groups]
        for group in asked[:1]:
            pool.check_columns(set(group.prompt.columns), group.prompt.columns)
        for again, then in zip(pool.score(asked), step.groups, strict=True):
            for i, (reward, old) in enumerate(zip(again.rewards, then.rewards, strict=True)):
                if then.group.completions[i].finish_reason != "abort":
                    where = f"step {step.step + 1}, {then.group.prompt.id}, completion {i}"
                    yield where, reward, {"run": old.parts.get(args.name, old.score)}
    for sentence in ledger.damaged:
        say_fault(sentence)


def _options_of_run(args: argparse.Namespace) -> dict[str, Any]:
    """The options that the run's config gives to the reward."""
    path = args.file / "config.yaml"
    specs = load_config(path).rewards.functions if path.is_file() else []
    return next((dict(spec.options) for spec in specs if spec.name == args.name), {})


def agreement(pairs: Sequence[tuple[str, Reward, float | None]]) -> list[str]:
    """How many completions score as in the run, the mean now and then, and some that differ."""
    differing = [pair for pair in pairs if not _is_same(pair[1].score, pair[2])]
    means = [
        f"{sum(known) / len(known):.4f}" if (known := [s for s in scores if s is not None]) else "none"
        for scores in ([reward.score for _, reward, _ in pairs], [then for *_, then in pairs])
    ]
    head = f"{len(pairs) - len(differing)} of {len(pairs)} score as in the run: "
    rows = [
        f"  {where}: {then}, now {new.score} ({new.reason})" for where, new, then in differing[:NUM_SHOWN]
    ]
    if len(differing) > NUM_SHOWN:
        rows.append(f"  and {len(differing) - NUM_SHOWN} more")
    return [head + f"mean {means[0]}, then {means[1]}; {len(differing)} differ", *rows] if pairs else []


def _is_same(now: float | None, then: float | None) -> bool:
    return now == then if now is None or then is None else abs(now - then) <= 1e-9
