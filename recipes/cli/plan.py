"""`cohort plan`: predicts a run's GPU memory, says whether it fits, and names settings that do."""

from __future__ import annotations

import argparse
import math

from recipes.cli.command import add_config
from rewards.plugins import reward_names
from rl.config.read import load_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser, such="model.dtype=bf16")
    parser.add_argument(
        "--gpu-gib", type=float, default=None, help="memory of the GPU to plan for; default: this machine's"
    )
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="of the run, one GPU each")


def run(arguments: argparse.Namespace) -> int:
    """Prints the predicted memory, part by part, and the values chosen for keys that are `auto`.

    Returns:
        0, or 1 if the given settings do not fit.

    Raises:
        ValueError: no choice for the `auto` keys fits (the message has overrides that do), or no prediction.
    """
    config = load_config(arguments.config, arguments.overrides, rewards=reward_names())
    gib = arguments.gpu_gib
    import torch

    from recipes.fit import as_overrides, fit_to, refusal, said_costs, said_host, said_whole
    from rl.config import check_processes
    from rl.plan.host import host_share, pinned
    from rl.plan.memory import GIB, Card

    if gib is None and not torch.cuda.is_available():
        raise ValueError("this machine has no GPU; give the memory to plan for, such as --gpu-gib 80")
    if gib is not None and not 0 < gib < math.inf:
        raise ValueError(f"--gpu-gib {gib:g} is not a GPU's memory; use more than 0, such as --gpu-gib 80")
    if arguments.processes < 1:
        raise ValueError(f"--processes {arguments.processes} must be at least 1")
    check_processes(config, arguments.processes)
    name = "a GPU" if gib is not None else torch.cuda.get_device_name()
    capacity = torch.cuda.mem_get_info()[1] if gib is None else int(gib * GIB)
    host = (
        None
        if gib is not None and config.memory.host_gib == "auto"
        else host_share(config, arguments.processes)
    )
    card = Card(name, capacity, arguments.processes, host=host)
    fitted = fit_to(config, card)
    if fitted.plan is None or fitted.size is None:
        raise ValueError("; ".join(fitted.notes))
    plan = fitted.plan
    for part in plan.parts:
        print(f"{part.name:30s}{part.bytes / GIB:8.1f} GiB  {part.phase}")
    judged = f"of {capacity / GIB:.0f}, {plan.room / GIB:.1f} may be filled"
    print(f"{'predicted':30s}{plan.total / GIB:8.1f} GiB {judged}")
    if host := said_host(pinned(fitted.size, fitted.config), card.host):
        print(host.removeprefix("; "))
    if whole := said_whole(fitted.size, fitted.config, card):
        print(whole.removeprefix("; "))
    if not plan.fits:
        print(f"does not fit{f': {plan.fault}' if plan.fault else ''}; {refusal(fitted.size, config, card)}")
        return 1
    if fitted.costs:
        print(said_costs(fitted.costs).removeprefix("; "))
    print(f"fits{f' with {as_overrides(fitted.chosen)}' if fitted.chosen else ''}")
    return 0
