"""`report.html`: one page about a run (finished, killed or running), from the files of its folder alone."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from rl.config import Config
from rl.config.diffusion import DiffusionConfig, TextConfig
from rl.config.diffusion_rl import MaskedRunConfig
from rl.config.read import flatten
from rl.config.sft import SftConfig
from rl.report.experts import expert_loads
from rl.report.figures import build_figures
from rl.report.groups import MAX_TEXT, json_for_html
from rl.report.page import write_page
from rl.report.run_facts import gather_facts
from rl.report.shelf import MAX_ROWS, PAGE_BYTES, SIDE_BYTES, Shelf
from rl.report.traces import denoising_html, sampled_traces
from rl.store.folder import CHANGES
from rl.store.ledger import Ledger
from rl.store.manifest import library_versions
from rl.store.redact import redact, show_controls
from rl.store.rows import read_rows

_MAX_SHOWN = 100_000
_MAX_NOTES = 50


def build_report(
    run_dir: str | Path,
    out: str | Path | None = None,
    *,
    page_bytes: int = PAGE_BYTES,
    side_bytes: int = SIDE_BYTES,
) -> Path:
    """Writes the report of a run, to `RUN/report.html` by default, and returns its path.

    Args:
        page_bytes: most bytes of group texts in the page. Texts of older groups go to side files in a folder
            beside the page, of the same name: `RUN/report/`.
        side_bytes: most bytes of all side files.

    Raises:
        ValueError: `run_dir` is not a folder.
    """
    run_dir = Path(run_dir)
    path = run_dir / "report.html" if out is None else Path(out)
    folder = path.with_suffix("") if path.suffix else path.with_name(path.name + "-groups")
    shelf = Shelf(run_dir, folder, page_bytes=page_bytes, side_bytes=side_bytes)
    return write_report(shelf, path)


def write_report(shelf: Shelf, path: Path, *, seconds: float = math.inf, live_s: int = 0) -> Path:
    """Writes the report of a run, some of whose groups may have been read before.

    Args:
        seconds: time limit for reading further groups; default: none.
        live_s: seconds after which the page reloads itself; 0: the run has ended.
    """
    facts = gather_facts(shelf.run_dir, is_running=live_s > 0)
    shelf.refresh(seconds)
    figures, more = build_figures(facts.curves)
    loads = expert_loads(shelf.run_dir / "experts.jsonl")
    notes = [*facts.notes, *shelf.faults]
    values = {name: getattr(facts, name) for name in ("name", "status", "verdict", "tiles", "checks")} | {
        "live": live_s,
        "figures": figures,
        "num_more": len(more),
        "has_experts": bool(loads),
        "num_groups": shelf.num_groups,
        "about_groups": _about_groups(shelf, path),
        "denoisings": _denoisings(shelf.run_dir, notes),
        "changed": _changed(facts.config),
        "changes": _changes(shelf.run_dir / CHANGES, notes),
        "config": shown_setting(facts.config) if facts.config else "",
        "result": {key: shown_setting(value) for key, value in flatten(facts.result).items()},
        "versions": library_versions(),
        "notes": [show_controls(note) for note in notes[:_MAX_NOTES]],
    }
    place = {"live": live_s, "made": time.time(), "folder": shelf.folder.name}
    data = {"page": json_for_html(place), "records": shelf.records_json(), "texts": shelf.texts_json()}
    if loads:
        data["experts"] = json_for_html(loads)
    if figures:
        data["curves"] = json_for_html([{"name": facts.name, "curves": facts.curves}])
        data["figure-list"] = json_for_html({"first": figures, "more": more})
    write_page(path, "report.html.j2", values, data=data)
    return path


def _about_groups(shelf: Shelf, path: Path) -> str:
    """Sentences about what the list of groups holds, and what it lacks."""
    num = shelf.num_groups
    parts = [f"{num:,} group{'s' * (num != 1)} of training and evaluation: a prompt and its completions."]
    if num > MAX_ROWS:
        parts.append(f"The newest {MAX_ROWS:,} are listed.")
    if shelf.num_unread:
        parts.append(f"{shelf.num_unread:,} older records are not read yet: cohort report reads them.")
    if shelf.has_side_files:
        parts.append(
            f"Texts of the newest are in this file, those of the others in the folder {shelf.folder.name} "
            f"beside {path.name}, at most {shelf.side_bytes >> 20:,} MiB."
        )
    parts.append(f"Of each completion at most {MAX_TEXT:,} characters are kept, from both of its ends.")
    return " ".join(parts)


def _denoisings(run_dir: Path, notes: list[str]) -> list[Markup]:
    """HTML of the order in which a diffusion model wrote some completions; empty for other models."""
    ledger = Ledger(run_dir)
    found = [
        Markup(denoising_html(scored.completions[i], f"Step {step}, prompt {scored.prompt.id}:"))
        for step, scored, i in sampled_traces(ledger)
    ]
    notes += [sentence for sentence in ledger.damaged if sentence not in notes]
    return found


def _changes(path: Path, notes: list[str]) -> list[list[str]]:
    """Step, key, old and new value of settings that changed when the run was resumed."""
    try:
        rows = redact(read_rows(path)[-_MAX_NOTES:])
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return []
    return [[shown_setting(row.get(name)) for name in ("step", "key", "old", "new")] for row in rows]


def _changed(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Settings that are not the defaults, by section: (key, value, default)."""
    plain = DiffusionConfig(data=TextConfig(source="")) if "objective" in config else Config()
    plain = MaskedRunConfig() if "diffusion" in config else plain
    plain = SftConfig(data=TextConfig(source="")) if {"moe", "rewards"} & config.keys() == {"moe"} else plain
    defaults = flatten(plain.model_dump(mode="json"))
    # Held-out data has the defaults of `data`.
    heldout = {f"evaluation.{key}": value for key, value in defaults.items() if key.startswith("data.")}
    rows = [
        (show_controls(key), shown_setting(value), shown_setting(defaults.get(key, "none")))
        for key, value in flatten(config).items()
        if (heldout | defaults).get(key, ...) != value
    ]
    section = lambda row: row[0].partition(".")[0] if "." in row[0] else "the run"  # noqa: E731
    return [(name, list(some)) for name, some in groupby(sorted(rows, key=section), section)]


def shown_setting(value: Any) -> str:
    """A setting as it stands in a config; text without quotes."""
    if not isinstance(value, str):
        value = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
        value = value.removesuffix("\n").removesuffix("\n...")
    return show_controls(value[:_MAX_SHOWN])
