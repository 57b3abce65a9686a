"""The run folder: who may write it, which config it belongs to, held-out results, and the final
`result.json`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rl.config import Config
from rl.config.read import dump_config, read_config
from rl.diffusion.config import DiffusionConfig
from rl.durable import written_whole
from rl.metrics import wilson_interval

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
        self.path = run_dir / "evaluation.jsonl"

    def read(self) -> list[Evaluation]:
        rows: list[Evaluation] = []
        if self.path.is_file():
            for line in self.path.read_text().splitlines():
                try:
                    rows.append(Evaluation(**json.loads(line)))
                except (json.JSONDecodeError, TypeError):
                    continue
        return rows

    def write(self, evaluation: Evaluation) -> None:
        self._replace([*(e for e in self.read() if e.step < evaluation.step), evaluation])

    def truncate_after(self, step: int) -> None:
        self._replace([e for e in self.read() if e.step <= step])

    def at(self, step: int) -> Evaluation | None:
        return next((e for e in self.read() if e.step == step), None)

    def _replace(self, rows: list[Evaluation]) -> None:
        write_atomically(self.path, "".join(json.dumps(asdict(e)) + "\n" for e in rows))


def write_atomically(path: Path, text: str) -> None:
    """The whole text or the old file, whatever happens in between."""
    with written_whole(path) as file:
        file.write(text.encode())


def claim_config(config: Config | DiffusionConfig) -> None:
    """Writes the resolved config into a run folder, or checks that a run that is resumed has the same.

    A folder whose run did no step yet, because a fault was found first, takes any config.

    Raises:
        ValueError: the folder holds a run with other settings; every difference is listed.
    """
    path = config.run_dir / "config.yaml"
    if path.is_file() and (changed := _changes(read_config(type(config), path), config)):
        if _has_steps(config.run_dir):
            lines = "\n  ".join(changed)
            raise ValueError(
                f"{config.run_dir} holds a run with other settings:\n  {lines}\n"
                "use another run_dir, or the settings that are there (only steps, saving, logging and engine "
                "limits may change)"
            )
        (config.run_dir / "evaluation.jsonl").unlink(missing_ok=True)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, dump_config(config))


def _changes(before: Config | DiffusionConfig, now: Config | DiffusionConfig) -> list[str]:
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    keys = sorted((old.keys() | new.keys()) - MAY_CHANGE)
    return [f"{k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in keys if old.get(k) != new.get(k)]


def _has_steps(run_dir: Path) -> bool:
    return any(any(run_dir.glob(pattern)) for pattern in ("ledger/step-*", "checkpoints/step-*"))


def write_result(
    config: Config, evaluations: list[Evaluation], *, steps: int, seconds: float
) -> dict[str, Any]:
    """`result.json`: held-out accuracy before and after with intervals, n, seconds, steps.

    `seconds` counts the whole run, restarts included.
    """
    result: dict[str, Any] = {"steps": steps, "seconds": round(seconds, 1)}
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        result |= {
            "heldout_before": first.accuracy,
            "heldout_before_interval": [first.low, first.high],
            "heldout_after": last.accuracy,
            "heldout_after_interval": [last.low, last.high],
            "n": last.n,
        }
    write_atomically(config.run_dir / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def read_result(run_dir: Path) -> dict[str, Any]:
    """What `write_result` wrote; empty if there is none."""
    try:
        return json.loads((run_dir / "result.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        key: value
        for name, sub in tree.items()
        for key, value in _flat(sub, f"{prefix}.{name}" if prefix else str(name)).items()
    }
