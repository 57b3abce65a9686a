"""`cohort plan`: what a run will take of a GPU's memory, whether that fits, and the settings that fill it."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from rewards.score import take_flags_anywhere
from rl.config import Config
from rl.config.read import load_config

if TYPE_CHECKING:
    from rl.plan.memory import MemoryPlan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpu-gib", type=float, default=None, help="default: this machine's GPU")
    take_flags_anywhere(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints what the config needs and what would fill the GPU; 1 if the config as it is does not fit."""
    config, gib = load_config(arguments.config, arguments.overrides), arguments.gpu_gib
    import torch

    from recipes.grpo import longest_sequence
    from recipes.kinds import kind_of
    from recipes.models import resolve_model
    from rl.plan.memory import GIB

    if gib is None and not torch.cuda.is_available():
        raise ValueError("this machine has no GPU to plan for; name its memory, such as --gpu-gib 80")
    if gib is not None and not 0 < gib < math.inf:
        raise ValueError(f"--gpu-gib {gib:g} is no GPU's memory; use a number above 0, such as --gpu-gib 80")
    capacity = torch.cuda.mem_get_info()[1] if gib is None else int(gib * GIB)
    model = config.model.model_copy(update={"name": resolve_model(config.model.name)})
    plan = kind_of(config).plan(config, model, capacity, longest_sequence(config))
    for name, size in plan.parts.items():
        print(f"{name:30s}{size / GIB:8.1f} GiB")
    print(f"{'predicted':30s}{plan.total / GIB:8.1f} GiB of {capacity / GIB:.0f}")
    share = config.engine.gpu_memory_utilization
    if share < plan.engine_share:
        print(
            f"engine.gpu_memory_utilization={share:g} is less than the engine's parts: its cache will hold "
            "fewer completions, or it will not start"
        )
    print(_judgement(plan, config))
    return 0 if plan.fits else 1


def _judgement(plan: MemoryPlan, config: Config) -> str:
    """Whether the config fits, and the settings that do."""
    from rl.plan.memory import GIB

    head = "fits" if plan.fits else "does not fit"
    head += f": {plan.total / GIB:.1f} GiB, and {plan.room / GIB:.1f} may be filled"
    if plan.token_budget:
        setting = f" engine.gpu_memory_utilization={plan.engine_share:.2f}" if plan.engine_share else ""
        verb = "fills it" if plan.fits else "fits"
        return f"{head}; {verb}: train.token_budget={plan.token_budget}{setting}"
    if plan.fits:
        return head
    remedies = ["model.gradient_checkpointing=true"] if not config.model.gradient_checkpointing else []
    remedies += [] if config.model.lora else ["model.lora={r: 16}"]
    remedies += ["a smaller sampling.max_completion_length", "a smaller engine.max_num_seqs"]
    return (
        f"{head}; no train.token_budget fits, as a prompt and its completion may have {plan.longest_row} "
        f"tokens: use {', '.join(remedies[:-1])} or {remedies[-1]}"
    )
