"""Saved evaluations: `eval.json`, its table, grading the kept completions again, and paired tests."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from recipes.evaluation.statistics import Sampled, gathered, mcnemar, paired, summary
from rewards.compose import RewardSpec
from rewards.pool.pool import RewardPool
from rl.report.safe_stream import say
from rl.store.folder import MUCH_CUT, write_atomically
from rl.store.ledger import Ledger
from rl.types import ALONE, ScoredGroup, Team

ALIASES = {"math-verify": "math_verify"}
PACKAGES = {"math_verify": "math-verify", "reasoning_gym": "reasoning-gym"}
SAME = ("prompts", "rows", "chat_template", "sampling", "num_samples", "seed", "engine")


def described(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of each grader, and the version of its package; the score is the first grader's."""
    versions = {name: version_of(PACKAGES.get(name, "cohort-rl")) for name in options}
    return {name: {"options": options[name], "version": versions[name]} for name in options}


def grader_pool(graders: Mapping[str, Any], workers: int, deadline_s: float) -> Any:
    specs = [RewardSpec(n, float(i == 0), options=g["options"]) for i, (n, g) in enumerate(graders.items())]
    return closing(RewardPool(specs, workers=workers, deadline_s=deadline_s))


def version_of(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def read_evaluation(path: Path) -> dict[str, Any]:
    """The contents of an `eval.json`, given as a file or as its folder.

    Raises:
        ValueError: the file is missing or damaged.
    """
    file = path / "eval.json" if path.is_dir() else path
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not an evaluation that cohort eval wrote: {error}") from error


def regrade(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Grades an evaluation's completions again and writes the results; ValueError if some are missing."""
    head, ledger = read_evaluation(folder), Ledger(folder, folder="evaluations")
    records = ledger.read_all(head["step"]) or []  # a folder may hold the completions of other steps too
    groups = [group.group for record in records for group in record.groups]
    if ledger.damaged or len(groups) != len(next(iter(head["scores"].values()))):
        raise ValueError(f"{folder}: completions are missing: {'; '.join(ledger.damaged) or len(groups)}")
    known = {name: grader["options"] for name, grader in head["graders"].items()}
    wanted = [ALIASES.get(name, name) for name in names] or list(known)
    head["graders"] = described({name: known.get(name, {}) for name in wanted})
    began = time.monotonic()
    with grader_pool(head["graders"], 2, head.get("deadline_s", 10.0)) as pool:
        scored = pool.score(groups)
        if pool.faults.num_faulty:
            say(str(pool.faults))
    head["seconds"]["graded again"] = time.monotonic() - began
    return concluded(head, scored, ALONE, folder)


def concluded(head: dict[str, Any], groups: Sequence[ScoredGroup], team: Team, out: Path) -> dict[str, Any]:
    """Adds results by grader, disagreements and all scores to `head`; rank 0 writes and prints them."""
    names = list(head["graders"])
    rows = {
        name: gathered([Sampled.of(g, name, head["by"], votes=name == names[0]) for g in groups], team)
        for name in names
    }
    differing = [row for some in team.gather(disagreements(groups, names)) for row in some]
    head["results"] = {name: summary(of_grader) for name, of_grader in rows.items()}
    head["disagreements"] = len(differing)
    head["scores"] = {name: {row.id: row.scores for row in rows[name]} for name in names}
    if team.rank == 0:
        write_atomically(out / "eval.json", json.dumps(head, indent=1) + "\n")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in differing)
        write_atomically(out / "disagreements.jsonl", lines)
        say(table(head, out))
    return head


def disagreements(groups: Sequence[ScoredGroup], names: Sequence[str]) -> list[dict[str, Any]]:
    """The completions that graders score differently."""
    return [
        {"prompt": group.prompt.id, "completion": i, "answer": group.prompt.columns.get("answer")}
        | {
            "scores": dict(reward.parts),
            "extracted": reward.extracted,
            "detail": reward.detail,
            "text": c.text,
        }
        for group in groups
        for i, (c, reward) in enumerate(zip(group.completions, group.rewards, strict=True))
        if len({reward.parts[name] for name in names}) > 1
    ]


def table(result: Mapping[str, Any], out: Path) -> str:
    """The numbers by grader with their intervals, and the settings that they depend on."""
    found, sampling, engine = (result[name] for name in ("results", "sampling", "engine"))
    first = next(iter(found.values()))
    lines = [f"{result['model']}, step {result['step']}, on {result['data']}: {first['n']:,} prompts"]
    lines.append(f"{'':12s}" + "".join(f"{name:28s}" for name in found))
    for label, path in _measures(first):
        cells = [_cell(found[name], path, found[name]["n"]) for name in found]
        lines.append(f"{label:12s}" + "".join(f"{cell:28s}" for cell in cells))
    abstained = ", ".join(f"{name} {100 * found[name]['abstained']:.1f} %" for name in found)
    lines += [
        f"cut at {sampling['max_completion_length']} tokens {100 * first['truncated']:.1f} %, "
        f"{first['mean_tokens']:.0f} tokens on average; abstained, and left out: {abstained}",
        f"weights {result['digest'][:12]}, template {result['chat_template'][:12]}, prompts "
        f"{result['prompts'][:12]}, temperature {sampling['temperature']:g}, top_p {sampling['top_p']:g}, "
        f"seed {result['seed']}, {engine['name']} {engine['version']}, {engine['dtype']}, "
        f"{sum(result['seconds'].values()):.0f} s",
    ]
    if len(found) > 1:
        lines.append(f"graders disagree on {result['disagreements']} completions: {out}/disagreements.jsonl")
    if first["truncated"] > MUCH_CUT:
        more = ", environment.max_turns or max_turn_length" if "environment" in result else ""
        lines.append(f"many completions were cut: raise evaluation.sampling.max_completion_length{more}")
    return "\n".join(lines)


def _measures(first: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    n = str(first["num_samples"])
    rows: list[tuple[str, tuple[str, ...]]] = [(f"avg@{n}", ("avg",))]
    if n != "1":
        rows += [(f"{kind}@{k}", (kind, k)) for kind in ("pass", "maj") for k in first[kind] if k != "1"]
    return rows + [(f"  {value}"[:12], ("by", value)) for value in first.get("by", ())]


def _cell(found: Mapping[str, Any], path: Sequence[str], num_prompts: int) -> str:
    for key in path:
        found = found.get(key, {})
    if not found:
        return "-"
    fewer = "" if found["n"] == num_prompts or path[0] == "by" else f" n={found['n']}"
    return (
        "{:.1f} % ({:.1f} to {:.1f})".format(*(100 * found[key] for key in ("value", "low", "high"))) + fewer
    )


def compare(paths: Sequence[Path], *, force: bool = False) -> str:
    """A paired test of two evaluations on the same prompts, by the first grader of each.

    Raises:
        ValueError: prompts, answers, template, sampler, seed, engine or first grader differ; it names them.
    """
    a, b = (read_evaluation(path) for path in paths)
    other = [name for name in SAME if a[name] != b[name]]
    if next(iter(a["graders"].items())) != next(iter(b["graders"].items())):  # the first one counts
        other.append("graders")
    if other and not force:
        said = "; ".join(f"{name}: {str(a[name])[:80]} and {str(b[name])[:80]}" for name in other)
        raise ValueError(f"these evaluations cannot be paired, as they differ: {said}; --force pairs them")
    means = [next(iter(one["scores"].values())) for one in (a, b)]
    ids = [i for i in means[0] if all(any(s is not None for s in m.get(i, ())) for m in means)]
    if not ids:
        raise ValueError("the two evaluations have no graded prompt in common")
    first, second = ([fmean(s for s in m[i] if s is not None) for i in ids] for m in means)
    found = paired(first, second)
    lines = [f"not the same: {', '.join(other)}"] if other else []
    lines.append(
        "{difference:+.1%} (95 % interval {low:+.1%} to {high:+.1%}, p = {p:.4f}, n = {n}, bootstrap over "
        "prompts, seed {seed})".format(**found)
    )
    if all(len(m[i]) == 1 for m in means for i in ids):
        lines.append(
            "only the first is right on {only_first}, only the second on {only_second} (McNemar, exact, "
            "p = {p:.4f})".format(**mcnemar(first, second))
        )
    return "\n".join(lines)
