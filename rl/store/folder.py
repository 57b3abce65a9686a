"""The run folder: who may write it, which config it belongs to, held-out results, and the final
`result.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from rl.config import Config
from rl.config.diffusion import DiffusionConfig
from rl.config.read import dump_config, flatten, read_config
from rl.store.durable import written_whole
from rl.store.inputs import MAY_DIFFER, Fingerprints, changes
from rl.store.metrics import wilson_interval
from rl.store.redact import redact
from rl.store.rows import RowLog, read_rows, record_of

E = TypeVar("E")
MAY_CHANGE = {
    "run_dir",
    "trackers",
    "train.steps",
    "train.max_bad_steps",
    "checkpoint.every",
    "checkpoint.keep",
    "evaluation.every",
    "engine.timeout_s",
    "engine.max_num_seqs",
    "engine.gpu_memory_utilization",
    "rewards.workers",
    "rewards.deadline_s",
}
PLACES = {
    f"{section}.{key}"
    for section, keys in (
        ("model", ("name", "revision", "chat_template")),
        ("data", ("source", "revision")),
        ("evaluation.data", ("source", "revision")),
    )
    for key in keys
}
"""Keys that say where something is: they may change if what is there is the same (`inputs.json`)."""


@dataclass(frozen=True)
class Evaluation:
    """Held-out accuracy with its 95 % Wilson interval over `n` prompts."""

    step: int
    accuracy: float
    low: float
    high: float
    n: int

    @staticmethod
    def of(step: int, total_score: float, n: int) -> Evaluation:
        low, high = wilson_interval(min(total_score, float(n)), n)
        return Evaluation(step, total_score / max(n, 1), low, high, n)

    def __str__(self) -> str:
        return f"{self.accuracy:.1%} right (95 % interval {self.low:.1%} to {self.high:.1%}, n = {self.n})"


class EvaluationLog:
    """`evaluation.jsonl`: one line per held-out evaluation, a step at most once."""

    def __init__(self, run_dir: Path) -> None:
        self._rows = RowLog(run_dir / "evaluation.jsonl", durable=True)
        self.path, self.truncate_after = self._rows.path, self._rows.truncate_after
        self.close = self._rows.close

    def read(self) -> list[Evaluation]:
        return [found for row in self._rows.read() if (found := record_of(Evaluation, row)) is not None]

    def at(self, step: int) -> Evaluation | None:
        row = self._rows.find(step)
        return None if row is None else record_of(Evaluation, row)

    def write(self, evaluation: Evaluation) -> None:
        """Records an evaluation, in place of an earlier one of its step and of what came after that."""
        self._rows.replace(asdict(evaluation))


def write_atomically(path: Path, text: str, *, mode: int = 0o666) -> None:
    """The whole text or the old file, whatever happens in between; `mode`: who may read it."""
    with written_whole(path, mode=mode) as file:
        file.write(text.encode())


def claim_config(config: Config | DiffusionConfig) -> None:
    """Writes the resolved config into a run folder, or checks that a run that is resumed has the same.

    A folder whose run did no step yet, because a fault was found first, takes any config. Where a model or a
    dataset is now said to be is left to `claim_inputs`, which knows the content.

    Raises:
        ValueError: the folder holds a run with other settings; every difference is listed.
    """
    path, has_steps = config.run_dir / "config.yaml", _has_steps(config.run_dir)
    if path.is_file() and (changed := _changes(read_config(type(config), path), config)):
        may_move = PLACES if (config.run_dir / "inputs.json").is_file() else set()
        if has_steps and changed.keys() <= may_move:
            return
        if has_steps:
            lines = "\n  ".join(changed.values())
            raise ValueError(
                f"{config.run_dir} holds a run with other settings:\n  {lines}\n"
                "use another run_dir, or the settings that are there (only steps, saving, logging and engine "
                "limits may change)"
            )
        (config.run_dir / "evaluation.jsonl").unlink(missing_ok=True)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_config(config)


def claim_inputs(
    config: Config | DiffusionConfig, found: Fingerprints, warn: Callable[[str], None] = print
) -> None:
    """Writes what a run begins with into `inputs.json`, or checks that a run that is resumed has the same.

    Raises:
        ValueError: model, tokenizer, chat template or rows are not those that the run began with.
    """
    path = config.run_dir / "inputs.json"
    try:
        before = json.loads(path.read_bytes())
    except (OSError, ValueError):
        before = None
    if _has_steps(config.run_dir):
        if not isinstance(before, dict):
            warn(
                f"{path} is missing or damaged: nobody can tell whether model and data are those that the "
                "run began with; from now on it holds the present ones"
            )
        else:
            _compare(config.run_dir, before, found, warn)
    write_atomically(path, json.dumps(found, indent=1) + "\n")
    write_config(config)


def _compare(run_dir: Path, before: Fingerprints, found: Fingerprints, warn: Callable[[str], None]) -> None:
    changed = changes(before, found)
    for what in changed.keys() & MAY_DIFFER:
        warn(f"{changed.pop(what)} since the run began")
    if changed:
        lines = "\n  ".join(changed.values())
        raise ValueError(
            f"{run_dir} holds a run that began with another model or other data:\n  {lines}\n"
            "put back what was there, or use another run_dir; to go on all the same, remove "
            f"{run_dir / 'inputs.json'}"
        )


def write_config(config: Config | DiffusionConfig) -> None:
    """`config.yaml`, from which the run can be repeated; for its owner alone if there are secrets in it."""
    text = dump_config(config)
    is_secret = redact(config.model_dump(mode="json")) != config.model_dump(mode="json")
    write_atomically(config.run_dir / "config.yaml", text, mode=0o600 if is_secret else 0o666)


def check_whole(run_dir: Path, *, first: int, last: int) -> None:
    """Raises RuntimeError if what a run of this process has written, from one step to another, is gone."""
    if first >= last:
        return
    there = {row["step"] for row in read_rows(run_dir / "metrics.jsonl")}
    lost = [] if (run_dir / "config.yaml").is_file() else ["config.yaml"]
    if missing := set(range(first + 1, last + 1)) - there:
        lost.append(f"metrics.jsonl (rows of {len(missing)} steps, the first of them {min(missing)})")
    if lost:
        raise RuntimeError(
            f"{run_dir}: {', '.join(lost)} went missing during the run, of which {last} steps are done; "
            "put it back, or use a new run_dir"
        )


def _changes(before: Config | DiffusionConfig, now: Config | DiffusionConfig) -> dict[str, str]:
    """Key -> what it was and is, without secrets."""
    old, new = flatten(before.model_dump(mode="json")), flatten(now.model_dump(mode="json"))
    keys = sorted(k for k in (old.keys() | new.keys()) - MAY_CHANGE if old.get(k) != new.get(k))
    shown = [(k, redact(old.get(k), k), redact(new.get(k), k)) for k in keys]
    return {k: f"{k}: {was!r} there, {now!r} now" for k, was, now in shown}


def _has_steps(run_dir: Path) -> bool:
    return any(any(run_dir.glob(pattern)) for pattern in ("ledger/step-*", "checkpoints/step-*"))


def write_result(
    config: Config, evaluations: Sequence[Evaluation], *, steps: int, seconds: float
) -> dict[str, Any]:
    """`result.json`: held-out accuracy before and after with intervals, n, seconds, steps.

    `seconds` counts the whole run, restarts included. Before is step 0 and after is step `steps`: one that
    is missing is null, never a number of another step, and `heldout_before_missing` says why.
    """
    result: dict[str, Any] = {"steps": steps, "seconds": round(seconds, 1)}
    if config.evaluation.data is not None:
        ends, missing = heldout_ends({e.step: e for e in evaluations}, steps, "evaluation.jsonl")
        for name, found in ends.items():
            result[name] = found and found.accuracy
            result[f"{name}_interval"] = found and [found.low, found.high]
        result |= missing | {"n": next((found.n for found in ends.values() if found), None)}
    write_atomically(config.run_dir / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def heldout_ends(found: Mapping[int, E], steps: int, file: str) -> tuple[dict[str, E | None], dict[str, str]]:
    """What was measured at step 0 and at the last step, by its name in `result.json`; why one is missing."""
    ends = {"heldout_before": 0, "heldout_after": steps}
    missing = {
        f"{name}_missing": f"{file} has no whole row of step {step}: it was lost or damaged"
        for name, step in ends.items()
        if step not in found
    }
    return {name: found.get(step) for name, step in ends.items()}, missing


def read_result(run_dir: Path) -> dict[str, Any]:
    """What `write_result` wrote; empty if there is none, or a damaged one."""
    try:
        result = json.loads((run_dir / "result.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) else {}
