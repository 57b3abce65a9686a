"""Grades the rows of a JSON-lines file with one reward (`cohort score`).

A row holds `completion` (text or messages), the columns that the reward needs, and optionally `id`, `prompt`,
`group` and `completion_ids`. For a group-wise reward, consecutive rows with the same `group` form a group;
without `group`, rows with the same `prompt` and columns do. A row with neither is a group of one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rewards.completion import completion_text
from rewards.plugins import RewardFunction
from rewards.pool.pool import RewardPool
from rewards.pool.worker import MAX_FRAME_BYTES
from rl.types import Completion, Group, Prompt, Reward

Row = Mapping[str, Any]
AHEAD = 512
PER_ROW = {"id", "completion", "completion_ids"}
SWITCHES = ["--chat", "--schema", "--change", "-h", "--help", "--base", "--regrade", "--compare", "--force"]


def add_deadline(parser: argparse.ArgumentParser) -> None:
    seconds = "seconds for one completion"
    parser.add_argument("--deadline", type=float, default=10.0, metavar="S", help=seconds)


def take_flags_anywhere(parser: argparse.ArgumentParser) -> None:
    """Lets key=value words follow flags; argparse alone rejects positionals after a flag."""
    parse: Any = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        return parse(flags_last(sys.argv[1:] if args is None else args), namespace)

    parser.parse_known_args = parse_known_args


def flags_last(words: Iterable[str]) -> list[str]:
    """The words with each --flag and its value moved to the end; all flags except `SWITCHES` have one."""
    plain, flags, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            plain.append(word)
            continue
        flags.append(word)
        if word not in SWITCHES and "=" not in word and rest:
            flags.append(rest.pop(0))
    return plain + flags


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of each line that is not empty.

    Raises:
        ValueError: the file does not exist, or a line is not a JSON object.
    """
    if not path.is_file():
        raise ValueError(f"no file {path}")
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_FRAME_BYTES), b""), 1):
            if len(line) >= MAX_FRAME_BYTES:
                raise ValueError(
                    f"{path}, line {number}: longer than {MAX_FRAME_BYTES >> 20} MiB, the limit of a row"
                )
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except RecursionError:
                raise ValueError(f"{path}, line {number}: nested too deeply for a row") from None
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f'{path}, line {number}: a row is an object such as {{"completion": "..."}}')
            yield number, row


def check_rows(pool: RewardPool, rows: Iterable[tuple[int, Row]]) -> None:
    """
    Raises:
        ValueError: a row has no completion or lacks a column, or a completion is neither text nor messages.
    """
    needs_ids = [asks.name for asks in pool.asks if asks.needs_ids]
    for number, row in rows:
        where = f"line {number}"
        completion = row.get("completion")
        if not (isinstance(completion, str) or _is_chat(completion)):
            raise ValueError(
                f"{where}: `completion` must be text or a list of messages; the row has: {', '.join(row)}"
            )
        if needs_ids and not isinstance(row.get("completion_ids"), list):
            raise ValueError(
                f"{where}: reward {needs_ids[0]!r} counts tokens, so each row needs `completion_ids`, a "
                "list of token ids"
            )
        try:
            pool.check_columns(set(row) - {"completion"}, None)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def _is_chat(value: Any) -> bool:
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(isinstance(m, dict) and "content" in m for m in value)


def score_rows(
    pool: RewardPool, rows: Iterable[tuple[int, Row]], *, chat: bool = False
) -> Iterator[tuple[Any, Reward]]:
    """(id, reward) of each row, in order; a few hundred groups are in flight."""
    flying: deque[tuple[list[Any], Any]] = deque()
    for ids, group in _groups(pool, rows, chat):
        flying.append((ids, pool.submit(group)))
        if len(flying) > AHEAD:
            ids, future = flying.popleft()
            yield from zip(ids, future.result().rewards, strict=True)
    for ids, future in flying:
        yield from zip(ids, future.result().rewards, strict=True)


def _groups(
    pool: RewardPool, rows: Iterable[tuple[int, Row]], chat: bool
) -> Iterator[tuple[list[Any], Group]]:
    numbered = ((index, number, row) for index, (number, row) in enumerate(rows))
    for _, members in itertools.groupby(numbered, key=lambda item: _key(pool.asks, item[0], item[2])):
        listed = list(members)
        (_, first, head), *others = listed
        for _, number, row in others:
            if _columns(pool.asks, row) != _columns(pool.asks, head):
                raise ValueError(
                    f"line {number} has the `group` of line {first} but other columns: "
                    "completions of a group answer one prompt; give each prompt its own `group`"
                )
        ids = [row.get("id", index) for index, _, row in listed]
        yield ids, to_group(str(ids[0]), [row for _, _, row in listed], chat=chat)


def _key(asks: Sequence[RewardFunction], index: int, row: Row) -> str:
    """A key that is equal for the rows of one group."""
    if not any(one.groupwise for one in asks) or not ("group" in row or row.get("prompt")):
        return json.dumps(index)
    if "group" in row:
        return json.dumps(["group", row["group"]])
    given = [{name: value for name, value in one.pick(row).items() if name not in PER_ROW} for one in asks]
    return json.dumps([row["prompt"], given], sort_keys=True)


def _columns(asks: Sequence[RewardFunction], row: Row) -> dict[str, Any]:
    """The columns of a row that a reward names in its signature."""
    named = {column for one in asks for column in (*one.required, *one.optional)} - PER_ROW
    return {name: value for name, value in row.items() if name in named}


def to_group(group_id: str, rows: list[Row], *, chat: bool = False) -> Group:
    """The rows of one prompt as a group, with the columns of the first row."""
    prompt, first = rows[0].get("prompt", ""), rows[0]["completion"]
    chat = chat or isinstance(prompt, list) or isinstance(first, list)
    text = prompt if isinstance(prompt, str) else ""
    asked = ({"role": "user", "content": text},) if chat else ()
    messages = tuple(prompt) if isinstance(prompt, list) else asked
    columns = {k: v for k, v in rows[0].items() if k not in ("completion", "prompt", "completion_ids")}
    completions = []
    for row in rows:
        ids = row.get("completion_ids") or []
        said = completion_text(row["completion"])
        completions.append(Completion(ids, [], [True] * len(ids), "stop", [], text=said))
    return Group(Prompt(group_id, text, (), messages, columns), completions)


def result(row_id: Any, reward: Reward) -> dict[str, Any]:
    """One line of output."""
    return {
        "id": row_id,
        "score": reward.score,
        "reason": str(reward.reason),
        "extracted": reward.extracted,
        "elapsed_ms": round(reward.elapsed_ms, 3),
        "detail": reward.detail,
    }


def summary(rewards: list[Reward], seconds: float) -> str:
    """A report of a few lines on the rewards of many rows."""
    scores = [reward.score for reward in rewards if reward.score is not None]
    counts = Counter(str(reward.reason) for reward in rewards)
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
    latency = sorted(reward.elapsed_ms for reward in rewards)
    mean = f"mean score {sum(scores) / len(scores):.4f}" if scores else "no scores"
    return (
        f"{len(rewards)} rows in {seconds:.2f} s ({len(rewards) / max(seconds, 1e-9):.0f}/s): {mean}, "
        f"{len(rewards) - len(scores)} abstained\n"
        f"reasons: {reasons}\n"
        f"latency: p50 {quantile(latency, 0.5):.2f} ms, p99 {quantile(latency, 0.99):.2f} ms"
    )


def quantile(ordered: list[float], share: float) -> float:
    """The smallest value that at least `share` of the ordered values do not exceed."""
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))]
