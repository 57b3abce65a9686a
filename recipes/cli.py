"""The `cohort` command."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rewards import doctor, score
from rewards.score import take_flags_anywhere
from rl.config.read import load_config
from rl.report.command import run_command
from rl.report.safe_stream import say
from rl.store.redact import redact

if TYPE_CHECKING:
    from rl.config import Config
    from rl.plan.memory import MemoryPlan


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns its exit code; a fault the user can mend is one sentence on stderr."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    return run_command(lambda: arguments.run(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cohort", description="Reinforcement-learning post-training for language models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train with GRPO; started again, it goes on where it stopped")
    train.add_argument("config", help="a YAML file, such as recipes/configs/quickstart.yaml")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as train.steps=20 model.dtype=fp32"
    )
    train.add_argument(
        "--processes",
        type=_count,
        default=None,
        metavar="N",
        help="default: one per GPU, one on a CPU machine",
    )
    take_flags_anywhere(train)
    train.set_defaults(run=_train)

    report = commands.add_parser("report", help="rebuild report.html from a run folder, finished or not")
    report.add_argument("run_dir", type=_path)
    report.add_argument("--out", type=_path, default=None)
    report.set_defaults(run=_report)

    denoising = commands.add_parser(
        "denoising", help="show in which order a diffusion model wrote completions of a run"
    )
    denoising.add_argument("run_dir", type=_path)
    denoising.add_argument("--frames", type=int, default=6)
    denoising.set_defaults(run=_denoising)

    config = commands.add_parser("config", help="check a config and print every key with its meaning")
    config.add_argument("config")
    config.add_argument("overrides", nargs="*", metavar="key=value")
    config.set_defaults(run=_config)

    plan = commands.add_parser("plan", help="predict a run's GPU memory, and the settings that fill the GPU")
    plan.add_argument("config")
    plan.add_argument("overrides", nargs="*", metavar="key=value")
    plan.add_argument("--gpu-gib", type=float, default=None, help="default: this machine's GPU")
    take_flags_anywhere(plan)
    plan.set_defaults(run=_plan)

    for name, run, help_text in (
        ("score", score.run, "grade the rows of a file with a reward"),
        ("doctor", _doctor, "check the rewards of a config against its dataset, before a run"),
    ):
        command = commands.add_parser(name, help=help_text)
        {"score": score, "doctor": doctor}[name].add_arguments(command)
        command.set_defaults(run=run)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    load_config(arguments.config, arguments.overrides)
    import torch

    gpus = torch.cuda.device_count()
    processes = arguments.processes or max(1, gpus)
    if 0 < gpus < processes:
        raise ValueError(f"--processes {processes}, and there are {gpus} GPUs; one process needs one GPU")
    recipe = [arguments.config, *arguments.overrides]
    if processes == 1:
        from recipes.grpo import main as grpo

        return grpo(recipe)
    from recipes.launch import launch

    return launch(recipe, processes)


def _count(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def _path(text: str) -> Path:
    return Path(text).expanduser()


_path.__name__ = "path"
_count.__name__ = "number of processes"


def _report(arguments: argparse.Namespace) -> int:
    from rl.report.report import build_report

    print(build_report(arguments.run_dir, arguments.out))
    return 0


def _denoising(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from rl.report.traces import denoising_frames, sampled_traces
    from rl.store.ledger import Ledger
    from rl.store.redact import strip_controls

    console = Console(highlight=False, markup=False)
    ledger = Ledger(arguments.run_dir)
    found = sampled_traces(ledger)
    for sentence in ledger.damaged:
        print(f"cohort: {strip_controls(sentence)}", file=sys.stderr)
    if not found:
        raise ValueError(f"{arguments.run_dir} holds no completion of a masked diffusion model")
    for step, scored, i in found:
        score = scored.rewards[i].score
        reward = "none" if score is None else f"{score:g}"
        console.print(f"step {step}, prompt {scored.prompt.id!r}, reward {reward}", style="bold")
        console.print(denoising_frames(scored.completions[i], max(arguments.frames, 1)))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from recipes.grpo import reward_specs
    from recipes.tasks import find_modules_beside, load_rows
    from recipes.tasks.prompts import unrendered_prompt

    find_modules_beside(arguments.config)
    data = load_config(arguments.config, arguments.overrides).data

    def load(path: str, overrides: Sequence[str]):
        return reward_specs(load_config(path, overrides)), load_rows(data), data.prompt_column

    return doctor.run(arguments, load, ask=partial(unrendered_prompt, data))


def _plan(arguments: argparse.Namespace) -> int:
    """Prints what the config needs and what would fill the GPU; 1 if the config as it is does not fit."""
    import torch

    from recipes.grpo import longest_sequence
    from recipes.models import resolve_model
    from rl.config.diffusion_rl import MaskedRunConfig
    from rl.diffusion.saved_config import refuse_masked
    from rl.model.loading import read_config
    from rl.plan.memory import GIB, plan_memory

    config, gib = load_config(arguments.config, arguments.overrides), arguments.gpu_gib
    if isinstance(config, MaskedRunConfig):
        raise ValueError(
            f"{arguments.config} trains a diffusion model, whose memory is not predicted; memory/peak in a "
            "run's metrics.jsonl says what its training process took, after one step already"
        )
    if gib is None and not torch.cuda.is_available():
        raise ValueError("this machine has no GPU to plan for; name its memory, such as --gpu-gib 80")
    if gib is not None and not 0 < gib < math.inf:
        raise ValueError(f"--gpu-gib {gib:g} is no GPU's memory; use a number above 0, such as --gpu-gib 80")
    capacity = torch.cuda.mem_get_info()[1] if gib is None else int(gib * GIB)
    name = resolve_model(config.model.name)
    refuse_masked(name, config.model.revision)
    model = read_config(config.model.model_copy(update={"name": name}))
    plan = plan_memory(model, config, capacity=capacity, max_length=longest_sequence(config))
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


def _config(arguments: argparse.Namespace) -> int:
    from rl.config.describe import described
    from rl.config.read import command_of, read_any_config

    config = read_any_config(arguments.config, arguments.overrides)
    tree = config.model_dump(mode="json")
    if (shown := redact(tree)) != tree:
        say("secrets are shown as ***; put them back before you use this as a config", sys.stderr)
    print(f"# of `{command_of(config)}`: every key, and what it means\n{described(config, shown)}", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
