"""Which keys of a config may change when a run resumes. A key in none of these sets may not."""

from __future__ import annotations

FREE = {
    "run_dir",
    "trackers",
    "train.steps",
    "train.max_bad_steps",
    "checkpoint.every",
    "checkpoint.keep",
    "evaluation.every",
    "engine.timeout_s",
    "engine.max_num_seqs",
    "engine.urls",
    "engine.token_file",
    "engine.weights_folder",
    "engine.weights_url",
    "engine.gpu_memory_utilization",
    "memory.optimizer_on_host",
    "memory.reference_on_host",
    "memory.host_gib",
    "rewards.workers",
    "rewards.deadline_s",
    "teacher.url",
    "teacher.token_file",
    "teacher.timeout_s",
    "environment.workers",
    "environment.deadline_s",
    "model.keep_logits",
}
"""Keys that may always change: no number of a step depends on them."""

ON_REQUEST = {
    "train.token_budget",
    "train.in_flight",
    "train.sample_while_training",
    "train.sharding",
    "memory.engine_sleeps",
    "model.gradient_checkpointing",
    "optimizer.lr",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.max_grad_norm",
    "engine.kv_cache_gib",
    "engine.enforce_eager",
    "engine.verify_sync",
    "engine.canary_tolerance",
    "environment.memory_gib",
    "rewards.memory_gib",
    "rewards.max_fault_share",
}
"""Keys that may change with `--change`: the run continues, although its steps do not share one config."""

PLACES = {
    f"{section}.{key}"
    for section, keys in (
        ("model", ("name", "revision", "chat_template")),
        ("teacher", ("name", "revision")),
        ("data", ("source", "revision")),
        ("evaluation.data", ("source", "revision")),
    )
    for key in keys
}
"""Keys that say where something is: they may change if what is there is the same (`inputs.json`)."""
