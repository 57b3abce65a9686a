"""How vLLM is started on this machine's device."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rl.types import SamplingParams
from rollout.vllm.core import request_body

Process = Literal["auto", "own", "early", "inside"]

# For every engine: tokens in, tokens out, no statistics, and our classes at two seams that vLLM offers.
_ALWAYS = {
    "skip_tokenizer_init": True,
    "generation_config": "vllm",  # the model's own would add its temperature and penalties
    "logprobs_mode": "processed_logprobs",
    "disable_log_stats": True,
    "use_tqdm_on_load": False,
    "seed": 0,
    "trust_remote_code": False,
    "worker_extension_cls": "rollout.vllm.worker.WeightReceiver",
    "scheduler_cls": "rollout.vllm.scheduler.make_scheduler",
}


@dataclass(frozen=True)
class CoreSettings:
    """How vLLM is started.

    Attributes:
        model: folder or hub name.
        max_model_len: longest prompt plus completion, in tokens.
        process: "own" gives vLLM's engine core a process of its own, which samples while this one trains;
            "inside" runs it in this one. "auto" is "own" on a GPU, where Python per completion is the limit.
            On a CPU, where both would share the same cores, it is "inside", unless vLLM would change the
            class of the trainer's model.
        gpu_memory_utilization: share of the GPU for weights, activations and KV cache.
        kv_cache_gib: KV cache on a CPU.
        enforce_eager: no CUDA graphs; default: eager on a CPU only.
        recompute_kv: an update computes the keys and values of running completions anew with the new weights;
            default: they stay those of the weights that sampled them.
        timeout_s: longest wait for the start, and for one answer of the core.
        routes: answers say which experts each token was computed with.
        apart: beside a core of its own process vLLM's worker, which starts the kernels, has another one.
        sleeps: weights and cache lie where `sleep` can drop them. On a CPU nothing is dropped.
    """

    model: str | Path
    dtype: torch.dtype
    max_model_len: int
    process: Process = "auto"
    max_num_seqs: int = 256
    gpu_memory_utilization: float = 0.35
    kv_cache_gib: float = 2.0
    enforce_eager: bool | None = None
    recompute_kv: bool = False
    timeout_s: float = 600.0
    revision: str | None = None
    routes: bool = False
    sleeps: bool = False
    apart: bool = False


def runs_on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def routes_unavailable() -> str | None:
    """Why this vLLM does not say which experts a token was computed with, or None."""
    if runs_on_cpu():
        return "vLLM on a CPU does not return routes (its second model runner does, and needs Triton)"
    return None


def engine_arguments(s: CoreSettings) -> dict[str, Any]:
    """What vLLM is started with.

    Raises:
        ValueError: the GPU has less than its share of memory left beside the trainer.
    """
    on_cpu = runs_on_cpu()
    eager = on_cpu if s.enforce_eager is None else s.enforce_eager
    return (_on_cpu(s) if on_cpu else _on_gpu(s, eager)) | {
        **_ALWAYS,
        "model": str(s.model),
        "revision": s.revision,
        "dtype": str(s.dtype).removeprefix("torch."),
        "max_model_len": s.max_model_len,
        "max_num_seqs": s.max_num_seqs,
        "enforce_eager": eager,
        "hf_overrides": with_selection_bias,
        **({"enable_return_routed_experts": True} if s.routes else {}),
    }


def with_selection_bias(config: Any) -> Any:
    """A DeepSeek-V3 config that says how its router selects: transformers does not save that, and without it
    vLLM makes no bias.
    """
    if getattr(config, "model_type", None) in ("deepseek_v3", "deepseek_v32") and not hasattr(
        config, "topk_method"
    ):
        config.topk_method = "noaux_tc"
    return config


def takes_own_process(process: str, arguments: dict[str, Any], *, on_cpu: bool) -> bool:
    """Whether the engine core gets a process of its own.

    Where vLLM has no code for a model (OLMo, SmolLM3, Phi, Starcoder2) it takes transformers' class and
    changes it for its whole process. A trainer's model of that class fails in its next forward pass.

    Raises:
        ValueError: `process` is "inside" for such a model.
    """
    if process in ("own", "early") or (process == "auto" and not on_cpu):
        return True
    from vllm import EngineArgs

    try:
        with process_state_kept():
            found: Any = EngineArgs(**arguments).create_model_config()
            changes_class = found.using_transformers_backend()
    except (ValueError, RuntimeError, AssertionError):
        return False  # the start will say why it refuses this
    if changes_class and process == "inside":
        raise ValueError(
            f"engine.process=inside: vLLM computes {arguments['model']} with transformers' own class and "
            "changes it for the whole process, the trainer's model included; use engine.process=auto"
        )
    return changes_class


def _on_cpu(s: CoreSettings) -> dict[str, Any]:
    return {
        "kv_cache_memory_bytes": int(s.kv_cache_gib * 2**30),
        "block_size": 32,  # tokens; completions share the full blocks of their prompt, 128 would share little
        # vLLM rewinds the generator of a prompt cut in two, which a CPU generator cannot do.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(4096, s.max_model_len),
    }


def _on_gpu(s: CoreSettings, eager: bool) -> dict[str, Any]:
    """Arguments to prefill a burst of prompts in a step or two, with graphs for any number of completions."""
    torch.cuda.empty_cache()
    (free, total), share = torch.cuda.mem_get_info(), s.gpu_memory_utilization
    if free < share * total:
        fits = int(100 * max(0.0, free - 2**30) / total) / 100  # 1 GiB for another process's context
        raise ValueError(
            f"engine.gpu_memory_utilization={share:g} of {total / 2**30:.0f} GiB is more than the "
            f"{free / 2**30:.1f} GiB that are free beside the trainer; use at most {fits:.2f}"
        )
    # vLLM's own choice of graphs ends at 512 completions.
    graphs = {"max_cudagraph_capture_size": max(min(2 * s.max_num_seqs, 512), min(s.max_num_seqs, 1024))}
    return {
        "gpu_memory_utilization": share,
        "max_num_batched_tokens": max(16384, s.max_model_len),
        "enable_sleep_mode": s.sleeps,
    } | ({} if eager else graphs)


def request_parameters(sampling: SamplingParams, with_logprobs: bool, with_prompt_logprobs: bool) -> Any:
    """vLLM's own form of `sampling`; a completion is answered once, when it is finished."""
    from vllm import SamplingParams as Parameters
    from vllm.sampling_params import RequestOutputKind

    return Parameters(
        **request_body(sampling),
        max_tokens=sampling.max_completion_length,
        logprobs=0 if with_logprobs else None,
        prompt_logprobs=0 if with_prompt_logprobs else None,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Puts back what vLLM changes for the whole process and the trainer relies on.

    vLLM reseeds Python's, numpy's and torch's global generators. It sets the matmul precision and the number
    of threads, and on a CPU replaces `torch.set_num_threads` by a function that does nothing. It also sets
    LD_PRELOAD, LOCAL_WORLD_SIZE and other variables, which would reach grader processes. Variables named
    VLLM_ stay: vLLM reads them.
    """
    environment = dict(os.environ)
    states = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    accelerator = torch.accelerator.synchronize, torch.accelerator.empty_cache
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        if torch.accelerator.is_available():
            # Without an accelerator these raise, so vLLM's empty versions have to stay.
            torch.accelerator.synchronize, torch.accelerator.empty_cache = accelerator
        for name in [n for n in os.environ if n not in environment and not n.startswith("VLLM_")]:
            del os.environ[name]
        os.environ.update({n: v for n, v in environment.items() if not n.startswith("VLLM_")})
