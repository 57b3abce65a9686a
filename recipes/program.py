"""How a training program starts and ends: what every recipe does around its run."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from recipes.cli.command import raise_open_files, run_command, say_fault
from recipes.fit import Fitted
from rl.config.read import flatten
from rl.phases import StopSignal, stop_with_launcher
from rl.report.display import Display
from rl.report.safe_stream import say
from rl.report.verdict import judge_run
from rl.store.durable import run_lock
from rl.store.folder import check_whole, claim_config, has_steps, write_config
from rl.store.manifest import library_versions, unsupported_versions
from rl.world import World, make_accelerator

CHANGE = "--change"
MAX_CLOCK_GAP_S = 60.0


def recipe_main(
    module: str, argv: Sequence[str] | None, run: Callable[[list[str], StopSignal, float], int]
) -> int:
    """What every recipe's `main` does around its run: usage, signals, and faults as one sentence.

    Args:
        run: gets the arguments, the signals that ask to stop, and when the program began (monotonic).

    Returns:
        The exit code: 0 if done, 1 after a fault, 2 without arguments, 128 + n if signal n stopped the run.
        The same command resumes a stopped run.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: accelerate launch -m {module} CONFIG.yaml [section.key=value ...] [--change]")
        return 0 if arguments else 2
    began = time.monotonic()
    stop = StopSignal(may_exit=True)

    def work() -> int:
        stop.install()
        stop_with_launcher()
        try:
            raise_open_files()
            return run(arguments, stop, began)
        except KeyboardInterrupt:
            say_fault("stopped at once; the same command goes on from the newest checkpoint")
            return 128 + signal.SIGINT
        finally:
            stop.restore()

    return run_command(work)


def without_change(words: Sequence[str]) -> tuple[list[str], bool]:
    """Arguments without `--change`, and whether it was among them."""
    return [word for word in words if word != CHANGE], CHANGE in words


def call_program(run: Callable[[StopSignal, float], int]) -> None:
    """Runs inside a user's program, where faults are raised. A signal that stopped the run takes its usual
    effect there once the step is saved: Ctrl-C raises KeyboardInterrupt.
    """
    stop, began = StopSignal(), time.monotonic()
    if threading.current_thread() is threading.main_thread():  # other threads get no signals
        stop.install()
    try:
        raise_open_files()
        code = run(stop, began)
    finally:
        stop.restore()
    if code and stop.received is not None:
        signal.raise_signal(stop.received)  # ends here, unless the program has a handler that returns
        raise KeyboardInterrupt("the run is saved but not finished; the same call resumes it")


def refuse_reimport() -> None:
    """Raises RuntimeError in a child process that imports the user's script again, and would train there."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "a child process imports this script again, and recipes.grpo.run would train there too; "
            'put the call under `if __name__ == "__main__":`'
        )


def _refuse_shards() -> None:
    """Refuses accelerate's own sharding: its FSDP reduces gradients in bf16, and does nothing on a CPU."""
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true"):
            raise ValueError(
                f"accelerate is set up for {name}, but recipes shard weights themselves: launch with "
                "--multi_gpu, or by cohort train CONFIG --processes N, and set train.sharding=full "
                "(recipes.llada: train.shard=true)"
            )


def run_program(
    stop: StopSignal,
    *,
    settle: Callable[[World], Fitted],
    build: Callable[[Fitted, World, Display], tuple[Any, Callable[[], None]]],
    train: Callable[[Any], int],
    conclude: Callable[[Any, int], None],
    engine_timeout_s: float = 0.0,
    change: bool = False,
    judged: bool = False,
) -> int:
    """Does a training run from config to report, under the lock of its folder; returns the exit code.

    Args:
        settle: the config for this number of processes and their devices, or a refusal.
        build: the run, restored to its newest checkpoint, and a function that closes what it opened.
        train: does the steps, and returns how many are done.
        conclude: writes and prints the results of a run that is done; on the main process.
        change: a run that goes on may have other settings (`rl.config.resume.ON_REQUEST`).
        judged: the verdict's rules apply to this kind of run.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _refuse_shards()
    accelerator = make_accelerator(engine_timeout_s)
    world = World(accelerator)
    stop.any_process = world.any
    fitted = settle(world)
    config = fitted.config
    with run_lock(config.run_dir) if world.is_main else nullcontext():
        check_alike(world, config)
        if world.is_main:
            claim_config(config, planned=fitted.planned, change=change)
            if not has_steps(config.run_dir):
                fitted.write()
        world.wait()
        with Display(config.train.steps, is_main=world.is_main) as display:
            stop.say = display.say
            for sentence in unsupported_versions():
                display.warn(sentence)
            if (sentence := world.exposure()) is not None:
                display.note(sentence)
            for sentence in fitted.notes:
                display.note(sentence)
            run, close = build(fitted, world, display)
            steps = _trained(run, train, close, fitted)
        is_stopped, total = steps < config.train.steps, config.train.steps
        if world.is_main:
            check_whole(config.run_dir, first=run.progress.start_step, last=steps)
            if not is_stopped:
                conclude(run, steps)
            if judged:
                verdict = judge_run(config.run_dir)
                say(f"verdict: {verdict.headline}")
                if verdict.findings and (hint := verdict.findings[0].hint):
                    say(f"what to do: {hint}")
            say(f"report: {run.observer.report.finish()}")
            if is_stopped:
                say(f"stopped after step {steps} of {total}; the same command goes on from there")
    world.end()
    return stop.exit_code() if is_stopped else 0


class Laps:
    """Seconds of a start by part; each call notes those since the one before, the first since `began`."""

    def __init__(self, began: float) -> None:
        self._began = self._at = began
        self._said: list[str] = []

    def __call__(self, part: str, detail: str = "") -> str:
        """Returns all that was noted so far."""
        before, self._at = self._at, time.monotonic()
        self._said.append(f"{part} {self._at - before:.1f}{detail and f' ({detail})'}")
        return f"ready after {self._at - self._began:.0f} s: {', '.join(self._said)}"


def check_alike(world: World, config: Any) -> None:
    """Compares what all processes of a run must share; they are perhaps on several hosts.

    Raises:
        ValueError: the same on every process: the first thing that differs, and where.
    """
    if world.size == 1:
        return
    seen = (
        Path(config.run_dir) / f".seen-{world.gather(secrets.token_hex(8))[0]}"
    )  # a name that no host caches
    if world.is_main:
        seen.touch()
    world.wait()
    clock, has_gpu = time.time(), world.accelerator.device.type == "cuda"  # perhaps not, though there is one
    mine = {
        "host": socket.gethostname(),
        "config": flatten(config.model_dump(mode="json")),
        "versions": library_versions(),
        "sees": seen.exists(),
        "gpu": str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid) if has_gpu else "",
        "clock": clock,
    }
    found = world.gather(mine)
    if world.is_main:
        seen.unlink()
    if (fault := first_difference(found, str(config.run_dir))) is not None:
        raise ValueError(fault)


def check_replay(world: World, policy: Any) -> None:
    """Compares whether the processes replay routes: each one may have met another server first.

    Raises:
        ValueError: some do and some do not; the same on every process.
    """
    found = world.gather(bool(getattr(policy, "replays", False)))
    if any(found) != all(found):
        raise ValueError(
            f"process {found.index(False)} found a server that does not say which experts computed a token, "
            f"and process {found.index(True)} found none: start all servers with "
            "--enable-return-routed-experts, or set moe.replay=none"
        )


def first_difference(processes: Sequence[Mapping[str, Any]], run_dir: str) -> str | None:
    """The first thing in which processes differ that they must share, or None.

    Args:
        processes: by rank: host, config and versions (flat), sees (the run's folder), gpu, clock (seconds).
    """
    first, where = processes[0], [f"process {k} on host {p['host']}" for k, p in enumerate(processes)]
    for what, remedy in (
        ("config", "start every process with the same file and the same key=value"),
        ("versions", "install the same on every host"),
    ):
        for place, one in zip(where, processes, strict=True):
            ours, theirs = first[what], one[what]
            for key in sorted(ours.keys() | theirs.keys()):
                if ours.get(key) != theirs.get(key):
                    values = (
                        f"{key}={theirs.get(key, 'missing')}, but {where[0]} has {ours.get(key, 'missing')}"
                    )
                    return f"{place} has {values}: {remedy}"
    gpus: dict[str, str] = {}
    for place, one in zip(where, processes, strict=True):
        if not one["sees"]:
            wrote = f"what {where[0]} wrote into {run_dir}"
            return f"{place} does not see {wrote}: let run_dir be on a disk that all hosts share"
        if one["gpu"] and (other := gpus.setdefault(one["gpu"], place)) != place:
            return f"{place} has the GPU of {other} ({one['gpu']}): start one process for each GPU of a host"
        if abs(ahead := one["clock"] - first["clock"]) > MAX_CLOCK_GAP_S:
            return f"{place} has a clock {ahead:+.0f} s off that of {where[0]}: set it by chrony or ntpd"
    return None


def _trained(run: Any, train: Callable[[Any], int], close: Callable[[], None], fitted: Fitted) -> int:
    """Records what changed in a resumed run, now that its start has succeeded, and trains."""
    try:
        if run.world.is_main:
            write_config(fitted.config)
            fitted.write()
        return train(run)
    except BaseException:
        if run.observer.report is not None:
            run.observer.report.close()
        raise
    finally:
        close()


def first_line(config: Any, policy: Any, *, rows: int, engine: str) -> str:
    """The first line of a log: what is trained, on which rows and device, and in which folder."""
    trained = sum(parameter.numel() for _, parameter in policy.trainable())
    total = sum(parameter.numel() for parameter in policy.model.parameters())
    sampled = f"engine {engine}, " if engine else ""
    return (
        f"{config.model.name}: {trained:,} of {total:,} parameters trained on {rows:,} rows, {sampled}"
        f"{policy.device}, {config.model.dtype}, in {config.run_dir}"
    )


def make_deterministic(seed: int, *, kernels: bool) -> None:
    """Seeds torch; with `kernels`, those of a CPU give the same bits each time."""
    torch.manual_seed(seed)
    if kernels and not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
