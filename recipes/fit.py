"""Chooses what `auto` becomes on this machine's GPUs, before anything is loaded, and keeps it in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from recipes.kinds import size_of
from recipes.models import resolve_model
from rl.config import Config, check_processes
from rl.config.read import read_config, replaced
from rl.config.sections import UNPLANNED_TOKENS
from rl.plan.host import check_host, host_share, pinned
from rl.plan.memory import GIB, Card, MemoryPlan, Planned, plan_memory
from rl.plan.search import PLANNED, fit, has_choice, is_auto, kept_whole, remedy, seconds_of, value_at
from rl.plan.sizes import ModelSize, NoPrediction
from rl.store.folder import has_steps, write_atomically
from rl.world import World

FILE = "plan.json"
UNPLANNED = {"train.token_budget": UNPLANNED_TOKENS, "model.gradient_checkpointing": False}
"""Values where nothing is planned: on a CPU, and for models whose memory cannot be predicted."""


@dataclass(frozen=True)
class Fitted:
    """A config whose `auto` keys have values where it could be planned, and what to report and to keep.

    Attributes:
        chosen: values of keys that were auto; an earlier run of this folder may have had others.
        notes: sentences for the user.
        plan, size: None on a CPU, and where nothing can be predicted.
        costs: predicted seconds per step that each key of `memory` costs.
    """

    config: Any
    chosen: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    plan: MemoryPlan | None = None
    card: Card | None = None
    size: ModelSize | None = None
    costs: Mapping[str, float] = field(default_factory=dict)

    @property
    def planned(self) -> set[str]:
        """Keys that this machine decides: a run may have begun with other values of them."""
        return {*self.chosen, *(key for key in PLANNED if is_auto(self.config, key))}

    def compare(self, held: int | None, note: Callable[[str], None]) -> None:
        """Reports how many bytes a full micro-batch held, and how many were predicted."""
        if held is None:
            return
        predicted = f" ({self.plan.training / GIB:.1f} were predicted)" if self.plan else ""
        note(f"a full micro-batch of the longest completions holds {held / GIB:.1f} GiB{predicted}")

    def write(self) -> None:
        """Writes `plan.json` into the run folder."""
        if self.card is None:
            return
        parts = [asdict(part) for part in self.plan.parts] if self.plan else []
        kept = {"card": _identity(self.card), "chosen": dict(self.chosen), "parts": parts}
        if self.plan:
            kept |= {"total": self.plan.total, "training": self.plan.training, "costs": dict(self.costs)}
        write_atomically(self.config.run_dir / FILE, json.dumps(kept, indent=1) + "\n")


def fit_to_cards(config: Planned, world: World) -> Fitted:
    """The config for this run's processes; a run that is resumed on the same GPUs keeps its values.

    Raises:
        ValueError: the groups of a step do not split over the processes, or no values of the `auto` keys
            make the run fit. The message then has overrides that do.
    """
    if isinstance(config, Config):
        check_processes(config, world.size)
    before = values_before(config, world)
    if world.accelerator.device.type != "cuda":
        return as_before(config, before, Card("cpu", 0, world.size))
    free, total = torch.cuda.mem_get_info()
    here = host_share(config, int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))
    capacity, free, host = (-int(n) for n in world.max([-float(n) for n in (total, free, here)]))
    fitted, shared = Fitted(config), {"refusal": ""}
    if world.is_main:  # other processes may see another card or other packages
        try:
            card = Card(torch.cuda.get_device_name(), capacity, world.size, free, host)
            fitted = fit_to(config, card, before)
            shared = {"chosen": dict(fitted.chosen), "notes": list(fitted.notes)}
        except ValueError as error:
            shared = {"refusal": str(error)}
    shared = world.gather(shared)[0]
    if "refusal" in shared:
        raise ValueError(shared["refusal"])
    if world.is_main:
        return fitted
    return Fitted(replaced(config, shared["chosen"]), shared["chosen"], tuple(shared["notes"]))


def values_before(config: Any, world: World) -> dict[str, Any] | None:
    """What `read_plan` finds on the main process, for all; None if the folder holds no run to resume."""
    goes_on = world.is_main and has_steps(config.run_dir)
    return world.gather(read_plan(config) if goes_on else None)[0]


def fit_to(config: Planned, card: Card, before: Mapping[str, Any] | None = None) -> Fitted:
    """The config for one kind of GPU. `before`: what `plan.json` holds."""
    model = config.model.model_copy(update={"name": resolve_model(config.model.name)})
    try:
        size = size_of(config, model)
    except NoPrediction as error:
        fitted = as_before(config, before, card)
        return replace(fitted, notes=(f"nothing is planned: {error}",))
    length, known = config.longest_sequence, before["chosen"] if before else {}
    check_host(size, config, card.host)
    goes_on = before is not None and before["card"] in (None, _identity(card))
    kept = {key: known[key] for key in PLANNED if goes_on and key in known and is_auto(config, key)}
    try:
        left_open = replaced(config, kept)
    except ValueError:  # keys that are given now contradict what was planned
        kept, left_open = {}, config
    found = fit(size, left_open, card, length)
    if found is None and not kept and has_choice(size, config, card.processes):
        raise ValueError(refusal(size, config, card))
    chosen = kept | (found or {})
    settled = replaced(config, chosen)
    check_host(size, settled, card.host)
    plan = plan_memory(size, settled, card, length)
    costs = seconds_of(size, settled, card.processes)
    host = said_host(pinned(size, settled), card.host)
    said = said_costs(costs) + host + said_whole(size, settled, card)
    notes = (_sentence(plan, card, chosen) + said, *_moved(before, chosen))
    return Fitted(settled, chosen, notes, plan, card, size, costs)


def said_costs(costs: Mapping[str, float]) -> str:
    said = ", ".join(f"{key} about {seconds:.1f} s" for key, seconds in costs.items())
    return f"; this costs per step: {said}" if costs else ""


def said_host(needed: int, free: int | None) -> str:
    of = "" if free is None else f" of {free / GIB:.1f} that it may take"
    return f"; each process pins {needed / GIB:.1f} GiB of host memory{of}" if needed else ""


def said_whole(size: ModelSize, config: Planned, card: Card) -> str:
    reason = kept_whole(size, config, card.processes)
    return f"; train.sharding=auto keeps whole copies: {reason}" if reason else ""


def as_before(config: Any, before: Mapping[str, Any] | None, card: Card | None = None) -> Fitted:
    """The config where nothing is planned: with the values that the run had, or those of `UNPLANNED`."""
    known = UNPLANNED | (before["chosen"] if before else {})
    chosen = {key: known[key] for key in UNPLANNED if is_auto(config, key)}
    return Fitted(replaced(config, chosen), chosen, tuple(_moved(before, chosen)), None, card)


def _moved(before: Mapping[str, Any] | None, chosen: Mapping[str, Any]) -> list[str]:
    """A sentence if the plan has other values than the run had before, else nothing."""
    known = before["chosen"] if before else {}
    moved = [
        f"{key} {known[key]} -> {chosen[key]}" for key in chosen if known.get(key, chosen[key]) != chosen[key]
    ]
    if before is None or not moved:
        return []
    return [
        f"planned anew, as the run began on {before['card']['processes']} x {before['card']['name']}: "
        f"{', '.join(moved)}; sums are taken in another order, so weights will not be bitwise those that the "
        "first plan gives"
    ]


def as_overrides(values: Mapping[str, Any]) -> str:
    """`key=value ...`, to be appended to a command."""
    return " ".join(f"{key}={_word(value)}" for key, value in values.items())


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return "'{" + ", ".join(f"{name}: {_word(v)}" for name, v in value.items()) + "}'"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _sentence(plan: MemoryPlan, card: Card, chosen: Mapping[str, Any]) -> str:
    engine = plan.held("engine", "sample")
    said = f": {as_overrides(chosen)}" if chosen else ", every value is given"
    judged = "" if plan.fits else f"; {plan.fault or 'more than fits'}, and the probe will say"
    alone = ", not at the same time" if plan.sleeps else ""
    parts = f" (training {plan.training / GIB:.1f}, engine {engine / GIB:.1f}{alone})" if engine else ""
    return (
        f"planned for {card.name} of {card.capacity / GIB:.0f} GiB: {plan.total / GIB:.1f} GiB{parts}"
        f"{said}{judged if engine else judged.replace('the probe', 'the first step')}"
    )


def refusal(size: ModelSize, config: Planned, card: Card) -> str:
    """Says that a run does not fit, and the smallest change of its config that does, ready to be copied."""
    found = remedy(size, config, card, config.longest_sequence)
    head = f"this run does not fit {card.name} of {card.capacity / GIB:.0f} GiB"
    if card.host is not None and (
        more := fit(size, config, replace(card, host=None), config.longest_sequence)
    ):
        needed = pinned(size, replaced(config, more))
        head += (
            f" with {card.host / GIB:.1f} GiB of host memory for each process; with {needed / GIB:.1f} it "
            "would (memory.host_gib)"
        )
    head += said_whole(size, config, card)
    if found is None:
        return f"{head}, and neither do adapters and short completions; use a smaller model or a larger GPU"
    return f"{head}; it does with: {as_overrides(found[0])}"


def _identity(card: Card) -> dict[str, Any]:
    return {"name": card.name, "capacity": card.capacity, "processes": card.processes}


def read_plan(config: Any) -> dict[str, Any] | None:
    """The values of this folder's run, given or chosen, and the card it was planned for; None: no run."""
    try:
        stored = read_config(type(config), config.run_dir / "config.yaml")
    except ValueError:
        return None
    values = {key: value_at(stored, key) for key in PLANNED if not is_auto(stored, key)}
    try:
        kept = json.loads((config.run_dir / FILE).read_bytes())
        if kept["card"].keys() >= {"name", "capacity", "processes"} and isinstance(kept["chosen"], dict):
            return {"card": kept["card"], "chosen": values | kept["chosen"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return {"card": None, "chosen": values}
