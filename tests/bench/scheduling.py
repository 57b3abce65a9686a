"""Python of vLLM's scheduler per sampled token, with and without our short cuts; no model, no GPU.

python -m tests.bench.scheduling [--running 256] [--steps 300]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rollout.vllm.scheduler import final_only
from rollout.vllm.settings import process_state_kept
from rollout.vllm.start import vllm_available
from tests.bench.workload import Workload, write_model

BLOCK = 16


def settings_for(folder: Path, **more: Any) -> Any:
    """vLLM's settings for a model folder."""
    from vllm.engine.arg_utils import EngineArgs

    fixed = {"skip_tokenizer_init": True, "disable_log_stats": True, "enforce_eager": True}
    with process_state_kept():
        return EngineArgs(model=str(folder), block_size=BLOCK, **fixed, **more).create_engine_config()


def make_scheduler(
    settings: Any,
    *,
    is_async: bool,
    num_blocks: int,
    short_cuts: bool = True,
    window: int = 0,
    wrapped: Callable[..., Any] | None = None,
    log_stats: bool = False,
) -> Any:
    """The scheduler of an engine without the engine. `window`: half of the layers see so many tokens.
    `wrapped`: what is made of vLLM's class, in place of one that answers once per completion.
    """
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        SlidingWindowSpec,
    )
    from vllm.v1.structured_output import StructuredOutputManager

    init_none_hash(hash)
    settings.cache_config.num_gpu_blocks = num_blocks
    shape: dict[str, Any] = {
        "block_size": BLOCK,
        "num_kv_heads": 1,
        "head_size": 1,
        "dtype": torch.float32,
    }
    groups = [KVCacheGroupSpec(["full"], FullAttentionSpec(**shape))]
    if window:
        groups.append(KVCacheGroupSpec(["window"], SlidingWindowSpec(sliding_window=window, **shape)))
    stock = AsyncScheduler if is_async else Scheduler
    ours = wrapped(stock) if wrapped else final_only(stock, short_cuts=short_cuts)
    return ours(
        vllm_config=settings,
        kv_cache_config=KVCacheConfig(num_blocks, [], groups),
        structured_output_manager=StructuredOutputManager(settings),
        block_size=BLOCK,
        hash_block_size=BLOCK,
        log_stats=log_stats,
    )


def make_request(name: str, prompt: list[int], parameters: Any) -> Any:
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    hasher = get_request_block_hasher(BLOCK, lambda x: hash(x).to_bytes(8, "big", signed=True))
    return Request(name, prompt, parameters, None, cache_salt="0", block_hasher=hasher)


def make_output(names: list[str], tokens: list[list[int]], logprobs: list[float]) -> Any:
    """What a model runner answers to a step."""
    from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

    column, ranks = np.array(logprobs, np.float32).reshape(-1, 1), np.arange(len(names), dtype=np.int32)
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={name: row for row, name in enumerate(names)},
        sampled_token_ids=tokens,
        logprobs=LogprobsLists(np.zeros(column.shape, np.int32), column, ranks),
        prompt_logprobs_dict={},
        pooler_output=[],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    if reason := vllm_available():
        parser.error(reason)
    for short_cuts in (False, True, False, True):
        schedule, update = measure(short_cuts, arguments.running, arguments.steps)
        print(
            f"{'short cuts' if short_cuts else 'stock':11s}{schedule:6.2f} us a token to schedule"
            f"{update:6.2f} us to take it in"
        )


def measure(short_cuts: bool, running: int, num_steps: int) -> tuple[float, float]:
    """Microseconds per token to schedule and to take in, with two steps on their way as on a GPU."""
    from vllm import SamplingParams

    with tempfile.TemporaryDirectory() as scratch:
        folder = write_model(Path(scratch) / "model", Workload(shape="tiny"))
        settings = settings_for(
            folder, max_model_len=2048, max_num_seqs=running, max_num_batched_tokens=16384
        )
    scheduler = make_scheduler(settings, is_async=True, short_cuts=short_cuts, num_blocks=128 * running + 1)
    for k in range(running):
        parameters = SamplingParams(
            max_tokens=1800, stop_token_ids=[2], ignore_eos=True, detokenize=False, logprobs=0
        )
        scheduler.add_request(make_request(str(k), [1000 + k // 8] * 200, parameters))
    seconds, num_tokens, on_their_way = [0.0, 0.0], 0, []
    for step in range(num_steps + 8):
        began = time.perf_counter()
        on_their_way.append(scheduler.schedule())
        scheduled = time.perf_counter()
        if len(on_their_way) == 1:
            continue
        names = list(on_their_way[0].num_scheduled_tokens)
        output = make_output(names, [[5 + step % 90] for _ in names], [0.0] * len(names))
        ready = time.perf_counter()
        scheduler.update_from_output(on_their_way.pop(0), output)
        if step >= 8:  # the prompts are through
            seconds = [seconds[0] + scheduled - began, seconds[1] + time.perf_counter() - ready]
            num_tokens += len(names)
    return 1e6 * seconds[0] / num_tokens, 1e6 * seconds[1] / num_tokens


if __name__ == "__main__":
    main()
