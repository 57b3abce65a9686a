"""Which keys of a config may change when a run resumes. A key in none of these sets may not."""

from __future__ import annotations

from collections.abc import Mapping


def _dotted(sections: Mapping[str, str]) -> set[str]:
    """{"data": "source revision"} -> {"data.source", "data.revision"}."""
    return {f"{section}.{key}" for section, keys in sections.items() for key in keys.split()}


FREE = {"run_dir", "trackers"} | _dotted(
    {
        "train": "steps max_bad_steps",
        "checkpoint": "every keep",
        "evaluation": "every",
        "engine": "timeout_s max_num_seqs urls token_file weights_folder weights_url gpu_memory_utilization",
        "memory": "optimizer_on_host reference_on_host host_gib",
        "rewards": "workers deadline_s",
        "teacher": "url token_file timeout_s",
        "environment": "workers deadline_s",
        "model": "keep_logits",
    }
)
"""Keys that may always change: no number of a step depends on them."""

ON_REQUEST = _dotted(
    {
        "train": "token_budget in_flight sample_while_training sharding",
        "memory": "engine_sleeps",
        "model": "gradient_checkpointing",
        "optimizer": "lr schedule warmup_steps max_grad_norm",
        "engine": "kv_cache_gib enforce_eager verify_sync canary_tolerance",
        "environment": "memory_gib",
        "rewards": "memory_gib max_fault_share",
    }
)
"""Keys that may change with `--change`: the run continues, although its steps do not share one config."""

PLACES = _dotted(
    {
        "model": "name revision chat_template",
        "teacher": "name revision",
        "data": "source revision",
        "evaluation.data": "source revision",
    }
)
"""Keys that say where something is: they may change if what is there is the same (`inputs.json`)."""
