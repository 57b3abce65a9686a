"""A run of a toy policy through `rl.train.train`: `python -m tests.toys.run NAME RUN_DIR [kill at step]`.

Several processes meet as `torch.distributed` says. What they sample is a function of the weights, the seed
and the prompt's number alone.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from rl.config.read import load_config
from rl.driver import go_on
from rl.optimizer import make_optimizer
from rl.phases import Phases, StopSignal
from rl.report.display import Display
from rl.report.observer import RunObserver
from rl.run import Run
from rl.store.checkpoint import CheckpointStore
from rl.store.folder import evaluation_log
from rl.store.ledger import Ledger
from rl.store.metrics import MetricsLog
from rl.train import train
from rl.types import Completion, Group, Prompt, Reward, ScoredGroup, VersionSpan
from rl.world import World

WORDS, GROUP, LENGTH = 12, 4, 5
STEPS = 6


class TableSource:
    """Completions of a table of bigrams; a completion that ends with word 7 is right.

    Process 1 of several has no work: its completions all get the same reward.
    """

    def __init__(self, world: World, kill_at: int) -> None:
        self.world, self.kill_at = world, kill_at
        self.cursor, self.policy_version = 0, 0
        self.last_counts: dict[str, float] = {}
        self.last_rejected: list[ScoredGroup] = []

    def groups(self, num_groups: int) -> Iterator[ScoredGroup]:
        if self.policy_version == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        first, self.cursor = self.cursor, self.cursor + num_groups
        for ordinal in range(first + self.world.rank, first + num_groups, self.world.size):
            prompt = Prompt(f"p{ordinal}", "", (1 + ordinal % 3, 4))
            drawn = [self._completion(random.Random(f"{ordinal}/{g}")) for g in range(GROUP)]
            rights = [c.token_ids[-1] == 7 and self.world.rank == 0 for c in drawn]
            yield ScoredGroup(Group(prompt, drawn), [Reward(float(right)) for right in rights])

    def _completion(self, draw: random.Random) -> Completion:
        ids, logprobs, last = [], [], 4
        for _ in range(draw.randint(1, LENGTH)):
            row = self.table[last].log_softmax(-1).tolist()
            (last,) = draw.choices(range(WORDS), [2.718281828**value for value in row])
            ids.append(last)
            logprobs.append(row[last])
        return Completion(
            ids, logprobs, [True] * len(ids), "stop", [VersionSpan(self.policy_version, len(ids))]
        )

    def yield_device(self) -> None:
        return

    def publish(self, weights: Any, *, version: int) -> dict[str, float]:
        self.table, self.policy_version = dict(weights)["table"].clone(), version
        return {"sync/seconds": 0.0}

    def settle(self) -> None:
        return

    def close(self) -> None:
        return


def main(name: str, run_dir: str, kill_at: str = "-1") -> None:
    toy = import_module(f"tests.toys.{name}")
    settings = [f"run_dir={run_dir}", f"train.steps={STEPS}", "train.prompts_per_step=4", "optimizer.lr=0.3"]
    settings += [f"train.group_size={GROUP}", "checkpoint.every=2", "train.token_budget=64", *toy.SETTINGS]
    config = load_config(None, settings)
    world = World(Accelerator(cpu=True))
    policy = toy.make_policy(world)
    display = Display(STEPS, is_main=False)
    run = Run(
        config=config,
        world=world,
        policy=policy,
        reference=toy.make_reference(policy),
        optimizer=make_optimizer(policy.trainable(), config.optimizer),
        source=TableSource(world, int(kill_at)),
        measure=None,
        store=CheckpointStore(Path(run_dir) / "checkpoints"),
        ledger=Ledger(run_dir, world.rank, world.size),
        log=MetricsLog(run_dir, own=[toy.METRIC]),
        evaluations=evaluation_log(Path(run_dir)),
        observer=RunObserver(display, config, is_main=world.is_main),
        phases=Phases(display.phase),
        stop=StopSignal(),
    )
    go_on(run)
    assert train(run) == STEPS
    world.end()


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True)
    main(*sys.argv[1:])
