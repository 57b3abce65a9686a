"""Predicted seconds per step that each way of saving memory costs. Plans try the cheapest ways first."""

from __future__ import annotations

from rl.config import Config
from rl.plan.host import layers_on_host, moments_on_host
from rl.plan.memory import Planned, in_flight
from rl.plan.sizes import ModelSize

HOST_RATE = 40e9
"""Bytes a second between pinned host memory and a GPU, one way: PCIe 5 x16 (an H100 or H200)."""
SLEEP_S = 0.3
"""Time in which vLLM frees and takes back 42 GiB, besides a sync, on an H200 (`tests/gpu/test_sleep.py`)."""
PREFILL_RATE = 4e14
"""FLOPs a second at which an engine recomputes the cache of completions in flight."""
FULL = 0.5
"""Mean length of completions as a share of their greatest length."""


def seconds_of(size: ModelSize, config: Planned, processes: int) -> dict[str, float]:
    """Key of `memory` -> seconds per step, for the keys that are on."""
    if not isinstance(config, Config):
        return {}
    t, memory, found = config.train, config.memory, {}
    if memory.engine_sleeps is True:
        ahead = in_flight(config, processes) * t.max_staleness / (1 + t.max_staleness)
        found["memory.engine_sleeps"] = (
            SLEEP_S + ahead * FULL * config.longest_row * 2 * size.active / PREFILL_RATE
        )
    if memory.optimizer_on_host is True:
        moved = 2 * moments_on_host(size, config)
        found["memory.optimizer_on_host"] = t.num_minibatches * t.num_epochs * moved / HOST_RATE
    if memory.reference_on_host is True:
        tokens = t.prompts_per_step * t.group_size / processes * FULL * config.longest_row
        passes = max(t.num_minibatches, -(-tokens // config.token_budget))
        found["memory.reference_on_host"] = passes * layers_on_host(size, config) / HOST_RATE
    return found
