"""Settings that fit: values of keys that are `auto`, and changes to a config that does not fit this GPU."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations
from typing import Any

from rl.config import Config, ModelConfig
from rl.config.read import replaced
from rl.model.units import whole_because
from rl.plan.host import layers_on_host, moments_on_host, pinned
from rl.plan.memory import (
    Card,
    Planned,
    engine_share,
    in_flight,
    indivisible,
    plan_memory,
    training_parts,
    uses_vllm,
)
from rl.plan.sizes import ModelSize

HOSTED = ("memory.optimizer_on_host", "memory.reference_on_host")
PLANNED = (
    "train.token_budget",
    "engine.gpu_memory_utilization",
    "engine.max_num_seqs",
    "model.gradient_checkpointing",
    "model.keep_logits",
    "train.sharding",
    "memory.engine_sleeps",
    *HOSTED,
)
ENOUGH_TOKENS = 8192
"""Tokens of a micro-batch below which a GPU waits for kernel launches."""
MOST_TOKENS = 32768
"""Tokens of a micro-batch above which it is not faster."""
KEPT_SHARE = 0.85
"""Share of its tokens that a micro-batch must have left where logits are kept. Keeping them spared 2 % of a
step of 1.5b (`tests.bench.train_profile`); by estimate, a seventh fewer tokens cost 1 %.
"""
STEP = 1024
CACHES = (1.0, 0.5, 0.25)
"""Shares of the completions in flight for which the cache has room at full length; most end sooner."""
SMALL_CACHES = (0.125, 0.0625, 0.03125, 0.015625, 0.0)
RULES = ((ENOUGH_TOKENS, CACHES), (0, CACHES + SMALL_CACHES))
"""Least tokens of a micro-batch, and shares to try; the second rule only if nothing fits by the first."""
HOST_RATE = 40e9
"""Bytes a second between pinned host memory and a GPU, one way: PCIe 5 x16 (an H100 or H200)."""
SLEEP_S = 0.3
"""Time in which vLLM frees and takes back 42 GiB, besides a sync, on an H200 (`tests/gpu/test_sleep.py`)."""
PREFILL_RATE = 4e14
"""FLOPs a second at which an engine recomputes the cache of completions in flight."""
FULL = 0.5
"""Mean length of completions as a share of their greatest length."""


def fit(size: ModelSize, config: Planned, card: Card, max_length: int) -> dict[str, Any] | None:
    """The fastest values that fit for keys of `PLANNED` that are auto; None if none fit.

    It prefers no recomputation of layers, then a cache for more completions, then more tokens in a
    micro-batch, some of which it trades for kept logits. It splits weights over processes, and else lets the
    engine sleep, before it recomputes layers. Only if nothing fits, it shrinks micro-batches below the fast
    size. The last resort is to keep moments, the reference or both in host memory, whatever costs least.
    """
    how: Any = {"size": size, "config": config, "card": card, "max_length": max_length}
    splits: list[dict[str, Any]] = [{}]
    if kept_whole(size, config, card.processes) is None:
        splits.append({"train.sharding": "full"})
    for rule in RULES:
        if (values := next(_fitting(splits, rule, **how), None)) is not None:
            return values

    def seconds(values: dict[str, Any]) -> float:
        return sum(seconds_of(size, replaced(config, values), card.processes).values())

    for rule in RULES:
        firsts = (next(_fitting([way], rule, **how), None) for way in _hosted(size, config, card))
        if found := [values for values in firsts if values is not None]:
            return min(found, key=seconds)
    return None


def _fitting(
    places: list[dict[str, Any]],
    rule: tuple[int, tuple[float, ...]],
    *,
    size: ModelSize,
    config: Planned,
    card: Card,
    max_length: int,
) -> Iterator[dict[str, Any]]:
    """Values that fit, the best first: by recomputation, whether the engine sleeps, and where weights are."""
    (floor, caches), given = rule, config.model.gradient_checkpointing
    how: Any = {"card": card, "max_length": max_length}
    for recompute in (False, True) if given == "auto" else (given,):
        for more in (engine | place for engine in _asleep(size, config) for place in places):
            settled = replaced(config, more)
            for values in _candidates(size, settled, caches=caches, recompute=recompute, **how):
                found = _with_logits(size, config, values=values | more, floor=floor, **how)
                if found is not None:
                    yield found


def _asleep(size: ModelSize, config: Planned) -> list[dict[str, Any]]:
    """An engine that is always awake and, if the config leaves it open, one that sleeps during training."""
    is_open = uses_vllm(size, config) and is_auto(config, "memory.engine_sleeps")
    may = is_open and isinstance(config, Config) and not config.train.sample_while_training
    return [{}, {"memory.engine_sleeps": True}] if may else [{}]


def _hosted(size: ModelSize, config: Planned, card: Card) -> list[dict[str, Any]]:
    """Settings that keep moments, the reference or both in free host memory."""
    if not isinstance(config, Config) or config.train.sharding in ("full", "hybrid"):
        return []
    keys = [key for key in HOSTED if is_auto(config, key)]
    if not config.copies_weights or size.has_own_sampler:
        keys = [key for key in keys if key != "memory.reference_on_host"]
    ways = [dict.fromkeys(some, True) for n in range(1, len(keys) + 1) for some in combinations(keys, n)]
    return [w for w in ways if card.host is None or pinned(size, replaced(config, w)) <= card.host]


def seconds_of(size: ModelSize, config: Planned, processes: int) -> dict[str, float]:
    """Key of `memory` -> predicted seconds per step that it costs, for the keys that are on."""
    if not isinstance(config, Config):
        return {}
    t, memory, found = config.train, config.memory, {}
    if memory.engine_sleeps is True:
        ahead = in_flight(config, processes) * t.max_staleness / (1 + t.max_staleness)
        flops = ahead * FULL * config.longest_row * 2 * size.active
        found["memory.engine_sleeps"] = SLEEP_S + flops / PREFILL_RATE
    if memory.optimizer_on_host is True:
        moved = 2 * moments_on_host(size, config)
        found["memory.optimizer_on_host"] = t.num_minibatches * t.num_epochs * moved / HOST_RATE
    if memory.reference_on_host is True:
        tokens = t.prompts_per_step * t.group_size / processes * FULL * config.longest_row
        passes = max(t.num_minibatches, -(-tokens // config.token_budget))
        found["memory.reference_on_host"] = passes * layers_on_host(size, config) / HOST_RATE
    return found


def kept_whole(size: ModelSize, config: Planned, processes: int) -> str | None:
    """Why train.sharding=auto keeps whole copies of the weights, however short memory is. "" if that is not
    left open, None where it may split them.
    """
    if not isinstance(config, Config) or config.train.sharding != "auto" or processes == 1:
        return ""
    if size.has_own_sampler:
        return "every process loads all weights of such a model before they are split"
    model, freezes = config.model.model_dump_json(), config.moe.freezes
    return config.whole_because or _kept_whole(size, model, processes, freezes)


@lru_cache(maxsize=64)
def _kept_whole(size: ModelSize, model: str, processes: int, freezes: bool) -> str | None:
    hollow = size.without_storage(ModelConfig.model_validate_json(model))
    return whole_because(hollow, processes, freezes=freezes)


def remedy(
    size: ModelSize, config: Planned, card: Card, max_length: int
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The least change that fits: overrides of the config, and values of keys that are auto then."""
    for overrides in _changes(size, config):
        changed = replaced(config, overrides)
        cut = config.longest_row - changed.longest_row
        if (values := fit(size, changed, card, max_length - cut)) is not None:
            return overrides, values
    return None


def _candidates(
    size: ModelSize,
    config: Planned,
    *,
    card: Card,
    max_length: int,
    caches: tuple[float, ...],
    recompute: bool,
) -> Iterator[dict[str, Any]]:
    """Values of the keys for recomputation and the engine's cache, in the order of preference."""
    slots = in_flight(config, card.processes)
    samples = isinstance(config, Config)
    has_share = uses_vllm(size, config) and is_auto(config, "engine.gpu_memory_utilization")
    has_slots = samples and is_auto(config, "engine.max_num_seqs")
    slots = min(config.max_num_seqs, slots) if samples else slots
    for cache in caches if has_share or has_slots else caches[:1]:
        cached, values = max(1, int(cache * slots)), {}
        if config.model.gradient_checkpointing == "auto":
            values["model.gradient_checkpointing"] = recompute
        if has_share and isinstance(config, Config):
            share = engine_share(size, config, card.capacity, cached * max_length)
            values["engine.gpu_memory_utilization"] = share
        if samples and has_slots:
            values["engine.max_num_seqs"] = min(config.max_num_seqs, max(8, 4 * cached))
        yield values


def _with_logits(
    size: ModelSize, config: Planned, *, values: dict[str, Any], **how: Any
) -> dict[str, Any] | None:
    """`_with_budget`, with kept logits where the config leaves that open and they cost few tokens."""
    if not isinstance(config, Config) or size.has_own_sampler or config.model.keep_logits != "auto":
        return _with_budget(size, config, values=values, **how)
    kept, plain = (
        _with_budget(size, config, values=values | {"model.keep_logits": keep}, **how)
        for keep in (True, False)
    )
    if kept is None or plain is None:
        return plain
    tokens, most = (found.get("train.token_budget", 1) for found in (kept, plain))
    return kept if tokens >= KEPT_SHARE * most else plain


def _with_budget(
    size: ModelSize, config: Planned, *, values: dict[str, Any], card: Card, max_length: int, floor: int
) -> dict[str, Any] | None:
    """`values` with the largest token budget that fits, if that is at least `floor` or a whole step. A budget
    that the config gives is not changed.
    """
    if values.get("engine.gpu_memory_utilization", 0.0) >= 1:
        return None

    def fits(more: dict[str, Any]) -> bool:
        return plan_memory(size, replaced(config, values | more), card, max_length).fits

    if config.train.token_budget != "auto":
        return values if fits({}) else None
    row = indivisible(config)
    step = -(-in_flight(config, card.processes) * row // STEP) * STEP
    most = max(row, min(MOST_TOKENS, step))
    least = max(row, min(floor, most))
    if not fits({"train.token_budget": least}):
        return None
    budgets = range(-(-(least + 1) // STEP) * STEP, most + 1, STEP)
    more = bisect_left(budgets, True, key=lambda budget: not fits({"train.token_budget": budget}))
    return values | {"train.token_budget": budgets[more - 1] if more else least}


def _takes_adapters(size: ModelSize, config: Planned) -> bool:
    """Whether adapters can be planned: peft refuses some families, and not every config may have them."""
    try:
        training_parts(size, replaced(config, {"model.lora": {"r": 16}}), 1)
    except ValueError:
        return False
    return True


def _changes(size: ModelSize, config: Planned) -> Iterator[dict[str, Any]]:
    """Overrides to try, from what a user notices least to what changes the task."""
    left_open = (key for key in PLANNED if key.startswith(("train.t", "engine.", "memory.")))
    planned: dict[str, Any] = {key: "auto" for key in left_open if not is_auto(config, key)}
    steps = [planned, planned | {"model.gradient_checkpointing": True}]
    if config.model.lora is None and _takes_adapters(size, config):
        steps += [step | {"model.lora": {"r": 16}} for step in steps]
    yield from steps
    samples = isinstance(config, Config)
    length = config.sampling.max_completion_length if samples else config.data.max_length
    while length > 256:
        length //= 2
        shorter = {"data.max_length": length, "data.too_long": "drop"}
        yield steps[-1] | ({"sampling.max_completion_length": length} if samples else shorter)


def has_choice(size: ModelSize, config: Planned, processes: int) -> bool:
    """Whether the config leaves something open that would change what fits."""
    unused = set() if uses_vllm(size, config) else {"engine.gpu_memory_utilization"}
    unused |= set() if kept_whole(size, config, processes) is None else {"train.sharding"}
    unused |= set() if isinstance(config, Config) else {"engine.max_num_seqs"}
    # These never make room for other keys.
    unused |= {key for key in PLANNED if key.startswith(("memory.", "model.keep_"))}
    return any(is_auto(config, key) for key in PLANNED if key not in unused)


def is_auto(config: Any, key: str) -> bool:
    return value_at(config, key) in ("auto", None)


def value_at(config: Any, key: str) -> Any:
    """The value at a dotted key of PLANNED; None if this kind of config lacks the key."""
    section, _, name = key.partition(".")
    return getattr(getattr(config, section, None), name, None)
