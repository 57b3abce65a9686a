"""How a training program starts and ends: what every recipe does around its run."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import DistributedType

from rl.phases import StopSignal, stop_with_launcher
from rl.policy import Trained
from rl.report.command import raise_open_files, run_command, say_fault
from rl.report.display import Display
from rl.report.report import build_report
from rl.report.safe_stream import say
from rl.store.durable import RunLock
from rl.store.folder import check_whole, claim_config
from rl.store.manifest import unsupported_versions
from rl.world import World, make_accelerator


def recipe_main(
    module: str, argv: Sequence[str] | None, run: Callable[[list[str], StopSignal, float], int]
) -> int:
    """What every recipe's `main` does around its run: usage, signals, and faults as one sentence.

    Args:
        run: gets the arguments, the signals that ask to stop, and when the program began (monotonic).

    Returns:
        The exit code: 0 done, 1 a fault the user can mend, 2 no arguments, 128 + n stopped by signal n (run
        again to go on).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: accelerate launch -m {module} CONFIG.yaml [section.key=value ...]")
        return 0 if arguments else 2
    began = time.monotonic()
    stop = StopSignal()

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


def run_program(
    config: Any,
    stop: StopSignal,
    *,
    check: Callable[[World], None],
    build: Callable[[World, Display], tuple[Any, Callable[[], None]]],
    train: Callable[[Any], int],
    conclude: Callable[[Any, int], None],
    engine_timeout_s: float = 0.0,
) -> int:
    """A training run from its config to its report, under the lock of its folder; returns the exit code.

    Args:
        check: refuses a number of processes that the config does not fit.
        build: the run, put back to its newest checkpoint, and the function that ends what it opened.
        train: does the steps, and says how many are done.
        conclude: writes and prints the results of a run that is done; on the main process.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    accelerator = make_accelerator(engine_timeout_s)
    world = World(accelerator)
    stop.any_process = world.any
    check(world)
    if (kind := accelerator.distributed_type) in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"accelerate is set up for {kind.value}, and recipes place the weights themselves; launch with "
            "--multi_gpu (recipes.llada splits them with train.shard=true; recipes.grpo keeps a whole copy "
            "in every process, and model.lora fits a larger model)"
        )
    with RunLock(config.run_dir) if world.is_main else nullcontext():
        if world.is_main:
            claim_config(config)
        world.wait()
        with Display(config.train.steps, is_main=world.is_main) as display:
            for sentence in unsupported_versions():
                display.warn(sentence)
            if (sentence := world.exposure()) is not None:
                display.note(sentence)
            run, close = build(world, display)
            try:
                steps = train(run)
            finally:
                close()
        is_stopped = steps < config.train.steps
        if world.is_main:
            check_whole(config.run_dir, first=run.progress.start_step, last=steps)
            if not is_stopped:
                conclude(run, steps)
            say(f"report: {build_report(config.run_dir)}")
            if is_stopped:
                say(
                    f"stopped after step {steps} of {config.train.steps}; the same command goes on from there"
                )
    world.end()
    return stop.exit_code() if is_stopped else 0


def make_deterministic(seed: int, *, kernels: bool) -> None:
    """Seeds torch; `kernels`: those of a CPU give the same bits each time."""
    torch.manual_seed(seed)
    if kernels and not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def share_start(policy: Trained, world: World) -> None:
    """Every process begins with the main one's trainable weights."""
    if world.size > 1:
        for _, parameter in policy.trainable():
            torch.distributed.broadcast(parameter.data, 0)
