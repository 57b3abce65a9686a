"""`cohort plan`: what a run will take of a GPU's memory, whether that fits, and the settings that do."""

from __future__ import annotations

import argparse
import math

from rewards.score import take_flags_anywhere
from rl.config.read import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpu-gib", type=float, default=None, help="default: this machine's GPU")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="each with a GPU of its own")
    take_flags_anywhere(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints what the run will hold, part by part, and the values of what is auto.

    Returns:
        0; 1 if what is given does not fit.

    Raises:
        ValueError: nothing that is left open makes it fit, with overrides that do; or no prediction.
    """
    config, gib = load_config(arguments.config, arguments.overrides), arguments.gpu_gib
    import torch

    from recipes.fit import as_overrides, fit_to, refusal, said_costs
    from rl.config import check_processes
    from rl.plan.memory import GIB
    from rl.plan.search import Card

    if gib is None and not torch.cuda.is_available():
        raise ValueError("this machine has no GPU to plan for; name its memory, such as --gpu-gib 80")
    if gib is not None and not 0 < gib < math.inf:
        raise ValueError(f"--gpu-gib {gib:g} is not a GPU's memory; use more than 0, such as --gpu-gib 80")
    if arguments.processes < 1:
        raise ValueError(f"--processes {arguments.processes} must be at least 1")
    check_processes(config, arguments.processes)
    name = "a GPU" if gib is not None else torch.cuda.get_device_name()
    capacity = torch.cuda.mem_get_info()[1] if gib is None else int(gib * GIB)
    card = Card(name, capacity, arguments.processes)
    fitted = fit_to(config, card)
    if fitted.plan is None or fitted.size is None:
        raise ValueError("; ".join(fitted.notes))
    plan = fitted.plan
    for part in plan.parts:
        print(f"{part.name:30s}{part.bytes / GIB:8.1f} GiB  {part.phase}")
    judged = f"of {capacity / GIB:.0f}, {plan.room / GIB:.1f} may be filled"
    print(f"{'predicted':30s}{plan.total / GIB:8.1f} GiB {judged}")
    if not plan.fits:
        print(f"does not fit{f': {plan.fault}' if plan.fault else ''}; {refusal(fitted.size, config, card)}")
        return 1
    if fitted.costs:
        print(said_costs(fitted.costs).removeprefix("; "))
    print(f"fits{f' with {as_overrides(fitted.chosen)}' if fitted.chosen else ''}")
    return 0
