"""What this code reaches for inside vLLM beyond its documented interface, and whether it is there.

Short names stand for dotted paths. `require` names at the start what a vLLM lacks, instead of an
AttributeError in the middle of a run. Fields of a request are read directly, since a function call for each
token would cost more than the reading.
"""

from __future__ import annotations

import dis
import importlib
import inspect
from operator import attrgetter
from typing import Any

from rollout.vllm.install import BELOW, OLDEST, distribution

PATHS: dict[str, dict[str, str]] = {
    "engine": {
        "client": "engine_core",
        "shutdown": "engine_core.shutdown",
        "process_inputs": "input_processor.process_inputs",
        "note_request": "output_processor.add_request",
        "supported_tasks": "get_supported_tasks",
    },
    "engine inside": {
        "core": "engine_core.engine_core",
        "batch_queue": "engine_core.engine_core.batch_queue",
        "pause": "engine_core.engine_core.pause_scheduler",
        "resume": "engine_core.engine_core.resume_scheduler",
    },
    "engine beside": {
        "outputs_queue": "engine_core.outputs_queue",
        "call_utility": "engine_core.call_utility",
        "processes": "engine_core.resources.engine_manager.processes",
    },
    "scheduler": {
        "requests": "requests",
        "waiting": "waiting",
        "caches": "kv_cache_manager.coordinator.single_type_managers",
        "allocate_slots": "kv_cache_manager.allocate_slots",
        "no_blocks": "kv_cache_manager.empty_kv_cache_blocks",
        "cache_blocks": "kv_cache_manager.cache_blocks",
    },
    "vllm.v1.core.sched.scheduler.Scheduler": {
        name: name for name in ("add_request", "finish_requests", "set_pause_state", "update_from_output")
    },
    "vllm.v1.request.Request": {
        name: name
        for name in (
            *("_output_token_ids", "_all_token_ids", "num_output_placeholders", "num_computed_tokens"),
            *("cache_salt", "block_hashes", "update_block_hashes"),
        )
    },
    "vllm.model_executor.model_loader.reload": {
        name: name for name in ("initialize_layerwise_reload", "finalize_layerwise_reload")
    },
    "worker": {name: name for name in ("get_model", "model_config", "vllm_config")},
}
# In which attribute a request counts tokens that are on their way and void: that of 0.32, that of 0.25.
NUM_VOID = ("num_stale_output_tokens", "async_tokens_to_discard")


def reach(kind: str, name: str, owner: Any) -> Any:
    return attrgetter(PATHS[kind][name])(owner)


def require(kind: str, owner: Any) -> None:
    """Checks every path of `kind`.

    Raises:
        ValueError: one is missing.
    """
    for path in PATHS[kind].values():
        at = owner
        for name in path.split("."):
            if not has(at, name):
                found = distribution()
                raise ValueError(
                    f"vLLM {found[1] if found else 'without a version'} has no {path} in its {kind}, which "
                    f"sampling with it needs: {name} is missing; install vllm>={OLDEST},<{BELOW}, or use "
                    "engine.name=transformers"
                )
            at = getattr(at, name, None)


def require_classes() -> None:
    """`require` for what can be looked at before vLLM starts."""
    for kind in PATHS:
        if kind.startswith("vllm."):
            module, _, leaf = kind.rpartition(".")
            found = importlib.import_module(module)
            require(kind, getattr(found, leaf))


def has(owner: Any, name: str) -> bool:
    """Whether an object has the attribute; of a class, whether it has it or its `__init__` sets it."""
    if hasattr(owner, name) or not inspect.isclass(owner):
        return hasattr(owner, name)
    made = dis.get_instructions(inspect.unwrap(owner.__init__))
    return any(step.opname == "STORE_ATTR" and step.argval == name for step in made)


def num_void_attribute() -> str | None:
    """The one of `NUM_VOID` that a request of this vLLM has."""
    from vllm.v1.request import Request

    return next((name for name in NUM_VOID if has(Request, name)), None)


def counts_tokens_in_flight() -> bool:
    from vllm.v1.request import Request

    return has(Request, "num_in_flight_tokens")
