"""The run folder: who may write it, which config it belongs to, held-out results, and the final
`result.json`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rl.config import Config
from rl.config.diffusion import DiffusionConfig
from rl.config.read import differing, dump_config, read_config
from rl.config.resume import FREE, ON_REQUEST, PLACES
from rl.config.sft import SftConfig
from rl.config.traces import TracesConfig
from rl.store.durable import written_whole
from rl.store.inputs import MAY_DIFFER, Fingerprints, changes
from rl.store.redact import redact, strip_controls
from rl.store.rows import RecordLog, read_rows

E = TypeVar("E")
RunConfig = Config | DiffusionConfig | SftConfig | TracesConfig
CHANGES = "changes.jsonl"
RUN_ID = "run_id"
CANARY_OF_TEACHER = "teacher.json"
MUCH_CUT = 0.05  # share of held-out completions; a cut one is usually wrong


@dataclass(frozen=True)
class Evaluation:
    """Held-out accuracy with its 95 % interval over `n` graded prompts (`recipes.evaluation.statistics`).

    Attributes:
        truncated, abstained: shares of the completions cut at the length limit, and not graded.
        mean_tokens: mean tokens of a completion.
        gain: mean change since step 0 of the `paired` prompts that were graded at both, with its 95 %
            interval and the two-sided p of a random-sign test.
    """

    step: int
    accuracy: float
    low: float
    high: float
    n: int
    truncated: float = 0.0
    abstained: float = 0.0
    mean_tokens: float = 0.0
    gain: float = 0.0
    gain_low: float = 0.0
    gain_high: float = 0.0
    gain_p: float = 1.0
    paired: int = 0

    def __str__(self) -> str:
        out = f"; {self.abstained:.1%} not graded and left out" if self.abstained else ""
        cut = f"; {self.truncated:.1%} of the completions were cut"
        since = (
            f"; {self.gain:+.1%} since step 0 ({self.gain_low:+.1%} to {self.gain_high:+.1%}, paired by "
            f"prompt, p = {self.gain_p:.2g})"
        )
        return (
            f"{self.accuracy:.1%} right (95 % interval {self.low:.1%} to {self.high:.1%}, n = {self.n}{out})"
            f"{cut if self.truncated > MUCH_CUT else ''}{since if self.paired else ''}"
        )


def evaluation_log(run_dir: Path) -> RecordLog[Evaluation]:
    return RecordLog(run_dir / "evaluation.jsonl", Evaluation)


def write_atomically(path: Path, text: str, *, mode: int = 0o666) -> None:
    """Replaces a file at once: it has the old text or the whole new one; `mode`: who may read it."""
    with written_whole(path, mode=mode) as file:
        file.write(text.encode())


def claim_config(config: RunConfig, *, planned: Collection[str] = (), change: bool = False) -> None:
    """Writes the resolved config into a run folder, or checks that a resumed run has the same one.

    A folder whose run has not done a step yet takes any config. Changed places of models and data are left to
    `claim_inputs`, which compares contents. Other changes of a resumed run are written by `write_config` once
    its start has succeeded; until then the folder stays as it is.

    Args:
        planned: keys whose values were chosen for this machine; they may differ.
        change: keys of `ON_REQUEST` may change.

    Raises:
        ValueError: the folder holds a run with other settings; every difference is listed.
    """
    changed = _changes(config)
    is_begun = has_steps(config.run_dir)
    if is_begun:
        _refuse(config.run_dir, changed, change=change, planned=planned)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    if not (config.run_dir / RUN_ID).is_file():
        write_atomically(config.run_dir / RUN_ID, secrets.token_hex(8) + "\n")
    if is_begun:
        return
    if changed:
        (config.run_dir / "evaluation.jsonl").unlink(missing_ok=True)
    (config.run_dir / CANARY_OF_TEACHER).unlink(missing_ok=True)
    write_config(config)


def run_name(run_dir: Path) -> str:
    """Names a run to others: by its folder, and by an id made at its start, as other hosts and containers may
    have folders of the same name. Both stay as they are when the run resumes.
    """
    return f"the run in {run_dir.absolute()} ({(run_dir / RUN_ID).read_text().strip()})"


def _refuse(
    run_dir: Path, changed: Mapping[str, tuple[Any, Any]], *, change: bool, planned: Collection[str]
) -> None:
    places = PLACES if (run_dir / "inputs.json").is_file() else set()
    allowed = FREE.union(planned, places, ON_REQUEST if change else set())
    if refused := {key: both for key, both in changed.items() if key not in allowed}:
        lines = "\n  ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in refused.items())
        remedy = (
            "use another run_dir, or the settings that are there (only steps, saving, logging and engine "
            f"limits may change, and with --change {', '.join(sorted(ON_REQUEST))})"
        )
        if refused.keys() <= ON_REQUEST:
            remedy = f"add --change (change=True in Python) to go on with them, recorded in {CHANGES}"
        raise ValueError(f"{run_dir} holds a run with other settings:\n  {lines}\n{remedy}")


def claim_inputs(config: RunConfig, found: Fingerprints, warn: Callable[[str], None] = print) -> None:
    """Writes what a run begins with into `inputs.json`, or checks that a resumed run has the same.

    Raises:
        ValueError: model, tokenizer, chat template or rows are not those that the run began with.
    """
    path, is_begun = config.run_dir / "inputs.json", has_steps(config.run_dir)
    before = _read_object(path)
    if is_begun and before is None:
        warn(
            f"{path} is missing or damaged: nobody can tell whether model and data are those that the run "
            "began with; from now on it holds the present ones"
        )
    changed = changes(before or {}, found) if is_begun else {}
    for what in changed.keys() & MAY_DIFFER:
        warn(f"{changed.pop(what)} since the run began")
    if changed:
        lines = "\n  ".join(changed.values())
        raise ValueError(
            f"{config.run_dir} holds a run that began with another model or other data:\n  {lines}\n"
            f"put back what was there, or use another run_dir; to go on all the same, remove {path}"
        )
    write_atomically(path, json.dumps(found, indent=1) + "\n")


def write_config(config: RunConfig) -> None:
    """Writes `config.yaml`, from which the run can be repeated; only its owner may read one with secrets.

    Differences from the config of earlier steps are recorded in `changes.jsonl` by rows {"step", "key",
    "old", "new"}, and named at the head of `config.yaml`. The step is that of the newest checkpoint.
    """
    path, log = config.run_dir / "config.yaml", config.run_dir / CHANGES
    if has_steps(config.run_dir) and (changed := _changes(config)):
        names = [path.name.removeprefix("step-") for path in (config.run_dir / "checkpoints").glob("step-*")]
        step = max((int(name) for name in names if name.isdecimal()), default=0)
        with log.open("a", encoding="utf-8") as file:
            for key in changed.keys() - PLACES - {"run_dir"}:
                row = {"step": step, "key": key, "old": changed[key][0], "new": changed[key][1]}
                file.write(json.dumps(row, default=str) + "\n")
    head = [
        f"# after step {r['step']}: {r.get('key')} {r.get('old')!r} -> {r.get('new')!r}"
        for r in read_rows(log)
    ]
    text = "".join(f"{strip_controls(line)}\n" for line in head) + dump_config(config)
    is_secret = redact(config.model_dump(mode="json")) != config.model_dump(mode="json")
    write_atomically(path, text, mode=0o600 if is_secret else 0o666)


def check_whole(run_dir: Path, *, first: int, last: int) -> None:
    """Raises RuntimeError if files or rows that this process wrote between two steps are gone."""
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


def _changes(config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Key -> (value in the run folder's config, value in this one), without secrets."""
    path = config.run_dir / "config.yaml"
    before = read_config(type(config), path) if path.is_file() else config
    return {k: (redact(old, k), redact(new, k)) for k, (old, new) in differing(before, config).items()}


def has_steps(run_dir: Path) -> bool:
    """Whether a run of this folder has sampled or saved something."""
    patterns = ("ledger/step-*", "checkpoints/step-*", "checkpoints/checkpoint-*/manifest.json")
    return any(any(run_dir.glob(pattern)) for pattern in patterns)


def write_result(
    config: Config,
    evaluations: Mapping[int, Evaluation],
    *,
    steps: int,
    seconds: float,
    verdict: str,
    checkpoint: Path,
) -> dict[str, Any]:
    """`result.json`: held-out accuracy before and after with intervals, n, seconds, steps, the verdict in one
    line, and the newest checkpoint, relative to the run folder, which may be moved.

    `seconds` counts the whole run, restarts included. Before is step 0 and after is step `steps`. A missing
    accuracy is null, never that of another step, and `heldout_before_missing` says why.
    """
    result: dict[str, Any] = {"steps": steps, "seconds": round(seconds, 1)}
    if config.evaluation.data is not None:
        ends, missing = heldout_ends(evaluations, steps, "evaluation.jsonl")
        for name, found in ends.items():
            result[name] = found and found.accuracy
            result[f"{name}_interval"] = found and [found.low, found.high]
            if found and found.abstained:
                result[f"{name}_abstained"] = found.abstained
        result |= missing | {"n": next((found.n for found in ends.values() if found), None)}
    if config.rewards.control != "none":
        result["control"] = config.rewards.control
    result |= {"verdict": verdict, "checkpoint": str(checkpoint.relative_to(config.run_dir))}
    write_atomically(config.run_dir / "result.json", json.dumps(result, indent=2) + "\n")
    return result


def heldout_ends(found: Mapping[int, E], steps: int, file: str) -> tuple[dict[str, E | None], dict[str, str]]:
    """Accuracies at step 0 and at the last step, by their names in `result.json`; why one is missing."""
    ends = {"heldout_before": 0, "heldout_after": steps}
    missing = {
        f"{name}_missing": f"{file} has no whole row of step {step}: it was lost or damaged"
        for name, step in ends.items()
        if step not in found
    }
    return {name: found.get(step) for name, step in ends.items()}, missing


def read_result(run_dir: Path) -> dict[str, Any]:
    """What `write_result` wrote, with the whole path of the checkpoint; empty if it is missing or damaged."""
    result = _read_object(run_dir / "result.json") or {}
    if isinstance(checkpoint := result.get("checkpoint"), str):  # an older file holds the path of its time
        result["checkpoint"] = str((run_dir / "checkpoints" / Path(checkpoint).name).resolve())
    return result


def _read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if that is missing or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
