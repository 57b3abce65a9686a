"""`cohort eval`: measures a model, checkpoint or run on a task; regrades or compares evaluations."""

from __future__ import annotations

import argparse
from pathlib import Path

from rewards.score import take_flags_anywhere

PATIENCE_S = 2400.0  # a third of how long processes wait for each other: one may have all the long answers
HELP = """\
cohort eval runs/quickstart                                     its newest checkpoint on its held-out prompts
cohort eval MODEL --task gsm8k_test.jsonl                       a folder or hub name; a file or a name
cohort eval MODEL --task aime24 evaluation.num_samples=16 evaluation.sampling.temperature=0.6
cohort eval A B --task FILE                                     both models, and a paired test
cohort eval --compare A/eval.json B/eval.json                   a paired test of two evaluations
cohort eval --regrade FOLDER --graders math,math-verify         grade its completions again"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = "Measure models on prompts, with intervals.", HELP
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("what", nargs="+", help="one or two models, adapters, checkpoints or runs; key=value")
    parser.add_argument("--task", help="file, name, hub name or reasoning_gym:NAME; default: the run's own")
    parser.add_argument(
        "--checkpoint", type=int, metavar="STEP", help="of a run; default: the newest complete one"
    )
    parser.add_argument("--base", action="store_true", help="measure the model that the run began with")
    parser.add_argument(
        "--graders", "--grader", default="", help="rewards, separated by commas; the first one counts"
    )
    parser.add_argument("--by", metavar="COLUMN", help="add a table grouped by this column of the dataset")
    parser.add_argument("--seed", type=int, help="of the sampler; default: the run's, or 0")
    parser.add_argument("--out", type=Path, help="output folder; default: evals/NAME-STEP-TASK")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="prompts are split over them")
    parser.add_argument("--regrade", action="store_true", help="grade the completions of an evaluation again")
    parser.add_argument("--compare", action="store_true", help="run a paired test of two evaluations")
    parser.add_argument("--force", action="store_true", help="compare despite other settings, and name them")
    take_flags_anywhere(parser)


def run(arguments: argparse.Namespace) -> int:
    a, overrides = arguments, [word for word in arguments.what if "=" in word]
    places, graders = [word for word in a.what if "=" not in word], list(filter(None, a.graders.split(",")))
    if len(places) not in ((2,) if a.compare else (1,) if a.regrade else (1, 2)):
        raise ValueError(f"give one or two models, two folders to --compare, one to --regrade; not {places}")
    from recipes.evaluation.evaluations import compare, regrade

    if a.regrade:
        regrade(Path(places[0]), graders)
    if a.compare:
        print(compare([Path(place) for place in places], force=a.force))
    if a.regrade or a.compare:
        return 0
    if a.processes > 1:
        from recipes.cli.launch import launch

        names = ("task", "checkpoint", "graders", "by", "seed", "out")
        flags = [f"--{name}={value}" for name in names if (value := getattr(a, name)) not in (None, "")]
        switches = [f"--{name}" for name in ("base", "force") if getattr(a, name)]
        return launch(["eval", *a.what, *flags, *switches], a.processes, "recipes.cli")
    return _measure(a, places, overrides, graders)


def check(words: list[str]) -> None:
    """Raises ValueError, or exits, if `cohort eval` would refuse these arguments."""
    from recipes.evaluate import Ask, settle

    parser = argparse.ArgumentParser(prog="cohort eval")
    add_arguments(parser)
    a = parser.parse_args(words)
    settle(Ask(a.what[0], a.task, [w for w in a.what if "=" in w], a.checkpoint, a.base, seed=a.seed))


def _measure(a: argparse.Namespace, places: list[str], overrides: list[str], graders: list[str]) -> int:
    from recipes.evaluate import Ask, evaluate
    from recipes.evaluation.evaluations import compare
    from rl.world import World, make_accelerator

    world, folders = World(make_accelerator(PATIENCE_S)), []
    for i, place in enumerate(places):
        out = a.out / str(i) if a.out and len(places) == 2 else a.out
        ask = Ask(place, a.task, overrides, a.checkpoint, a.base, graders, a.by, out, a.seed)
        folders.append(Path(evaluate(ask, world)["folder"]))
    if len(folders) == 2 and world.is_main:
        print(compare(folders, force=a.force))
    world.end()
    return 0
