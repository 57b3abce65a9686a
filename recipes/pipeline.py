"""Runs stages of training, each a recipe: `python -m recipes.pipeline CONFIG.yaml [run_dir=FOLDER]`.

Each stage has its own process and folder, and `${name}` stands for what an earlier stage made. All stages are
read and checked before the first one starts. Started again, it skips stages whose own files say that they are
finished, and resumes an unfinished one as its recipe does.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from recipes.cli.command import BOOT, pass_signals_on, run_command
from recipes.finished import is_finished
from recipes.tasks import check_local, find_modules_beside
from rewards.compose import reward_specs
from rewards.plugins import reward_names
from rewards.pool.pool import RewardPool
from rl.config import Config
from rl.config.bounded_yaml import read_yaml
from rl.config.read import COMMANDS, differing, dump_config, read_config, validated, validated_run
from rl.config.resume import FREE
from rl.config.traces import PipelineConfig, StageConfig, TracesConfig
from rl.report.safe_stream import say
from rl.store.durable import run_lock
from rl.store.folder import read_result, write_atomically

REFERENCE = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True)
class Recipe:
    """A module with a `main`, and a function from its config to its result's path below its folder.

    Attributes:
        command: whose configs it takes (`rl.config.read.COMMANDS`). If empty, it is a program that takes
            arguments; `arguments` come first.
    """

    module: str
    output: Callable[[Any], str]
    command: str = ""
    arguments: tuple[str, ...] = ()


def _step(config: Any) -> str:
    return f"checkpoints/step-{config.train.steps:06d}"


RECIPES = {
    "grpo": Recipe("recipes.grpo", _step, "cohort train"),
    "llada": Recipe("recipes.llada", _step, "python -m recipes.llada"),
    "sft": Recipe(
        "recipes.sft",
        lambda config: f"checkpoints/checkpoint-{config.train.steps}",
        "python -m recipes.sft",
    ),
    "rejection": Recipe("recipes.rejection", lambda config: "traces.parquet", "cohort sample"),
    "eval": Recipe("recipes.cli", lambda config: "eval.json", arguments=("eval", "--out=${here}")),
    "upcycle": Recipe("recipes.upcycle", lambda config: ""),
    "prune": Recipe("recipes.prune", lambda config: ""),
}


@dataclass(frozen=True)
class Stage:
    """A stage with its references filled in. If `config` is None, it is a program called with `words`."""

    name: str
    recipe: Recipe
    folder: Path
    config: Any
    words: tuple[str, ...]

    @property
    def output(self) -> Path:
        return self.folder / self.recipe.output(self.config)

    @property
    def file(self) -> Path:
        """The file with the config or the words that the stage is started with."""
        return self.folder.with_name(f"{self.name}.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the stages; returns 0, the exit code of a failed stage, or 128 + the signal that stopped it."""
    parser = argparse.ArgumentParser(prog="python -m recipes.pipeline", description=__doc__)
    parser.add_argument("config", help="a YAML file, such as recipes/configs/pipeline_sums.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as run_dir=FOLDER")
    arguments = parser.parse_args(argv)
    return run_command(lambda: run(arguments.config, arguments.overrides))


def run(path: str, overrides: Sequence[str] = ()) -> int:
    find_modules_beside(path)
    config = read_config(PipelineConfig, path, overrides)
    stages = resolved(config)
    with run_lock(config.run_dir):
        done = [is_done(stage) for stage in stages]
        first = done.index(False) if False in done else len(stages)
        if later := [stage.name for stage in stages[first + 1 :] if stage.folder.exists()]:
            raise ValueError(
                f"stage {stages[first].name} is not finished, but {later[0]} has begun with its result; "
                f"restore its folder, or remove {config.run_dir / later[0]}"
            )
        for stage in stages[first:]:
            with of_stage(stage.name):
                check_rewards(stage.config)
        running = list[subprocess.Popen[bytes]]()
        heard = pass_signals_on(running)
        for number, stage in enumerate(stages[first:], first + 1):
            say(f"stage {number} of {len(stages)}: {stage.name} ({stage.recipe.module})")
            code = run_stage(stage, running, heard)
            if code and not heard and is_done(stage):  # a library's threads may abort a process at its end
                say(f"stage {stage.name} was finished when its process ended with exit code {code}")
            elif code:
                say(f"stage {stage.name} ended with exit code {code}; the same command goes on from there")
                return code
    say(f"pipeline finished: {stages[-1].output}")
    return 0


def resolved(config: PipelineConfig) -> list[Stage]:
    """The stages with checked configs.

    Raises:
        ValueError: a recipe is unknown, a reference names no earlier stage, a stage's config has a fault, or
            a file of data is missing.
    """
    stages: list[Stage] = []
    for own in config.stages:
        with of_stage(own.name):
            made = {stage.name: str(stage.output) for stage in stages}
            stages.append(_resolved(own, config.run_dir / own.name, made))
    return stages


@contextmanager
def of_stage(name: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"stage {name}: {error}") from None


def _resolved(own: StageConfig, folder: Path, made: Mapping[str, str]) -> Stage:
    if (recipe := RECIPES.get(own.recipe)) is None:
        raise ValueError(f"no recipe {own.recipe!r}; there are {', '.join(RECIPES)}")
    if own.arguments if recipe.command else own.config:
        wrong, right = ("arguments", "config") if recipe.command else ("config", "arguments")
        raise ValueError(f"{own.recipe} takes no {wrong}; use {right}")
    if not recipe.command:
        words = filled([*recipe.arguments, *own.arguments], {**made, "here": str(folder)})
        if recipe.module == "recipes.cli":
            import_module("recipes.cli.eval").check(words[1:])
        else:
            import_module(recipe.module).make_parser().parse_args(words)
        return Stage(own.name, recipe, folder, None, tuple(words))
    if "run_dir" in own.config:
        raise ValueError(f"its run_dir is {folder}; remove config.run_dir")
    tree = filled(own.config, made) | {"run_dir": str(folder)}
    (schema, *others) = COMMANDS[recipe.command]
    read = validated_run if others else partial(validated, schema)
    config: Any = read(tree, None, rewards=reward_names())
    held = getattr(getattr(config, "evaluation", None), "data", None)
    for data in (config.data, held):
        if data is not None and data.source not in made.values():
            check_local(data)
    return Stage(own.name, recipe, folder, config, ())


def filled(tree: Any, made: Mapping[str, str]) -> Any:
    """The tree with `${name}` replaced in its texts; ValueError for the name of no earlier stage."""
    if isinstance(tree, dict):
        return {key: filled(value, made) for key, value in tree.items()}
    if isinstance(tree, list):
        return [filled(value, made) for value in tree]
    if not isinstance(tree, str):
        return tree
    if unknown := [found for found in REFERENCE.findall(tree) if found not in made]:
        raise ValueError(f"${{{unknown[0]}}} names no earlier stage; there are: {', '.join(made) or 'none'}")
    return REFERENCE.sub(lambda found: made[found[1]], tree)


def check_rewards(config: Any) -> None:
    """Raises ValueError for rewards that cannot be found or set up."""
    if isinstance(config, Config | TracesConfig):
        RewardPool(reward_specs(config.paid_rewards)).close()


def is_done(stage: Stage) -> bool:
    """Whether the stage's own files say that it is over.

    Raises:
        ValueError: it is finished, but with other settings than it has now.
    """
    if stage.config is None:
        if not stage.output.exists():
            return False
        before, now = read_yaml(stage.file), list(stage.words)
        changed = {"arguments": (before, now)} if before != now else {}
    else:
        file, result = stage.folder / "config.yaml", read_result(stage.folder)
        if not result or not file.is_file():
            return False
        old = read_config(type(stage.config), file)
        steps = getattr(getattr(old, "train", None), "steps", 0)
        if result.get("steps", 0) < steps or not (stage.folder / stage.recipe.output(old)).exists():
            return False
        free, found = FREE - {"train.steps"}, differing(old, stage.config).items()
        changed = {k: both for k, both in found if both[1] != "auto" and k not in free}
    if changed:
        lines = "\n  ".join(f"{k}: {there!r} there, {now!r} now" for k, (there, now) in changed.items())
        raise ValueError(
            f"stage {stage.name} is finished with other settings:\n  {lines}\nput them back, use another "
            f"run_dir, or remove {stage.folder} and the folders of later stages to redo them"
        )
    if isinstance(stage.config, Config):
        return is_finished(stage.config)
    say(f"already finished: {stage.output}")
    return True


def run_stage(stage: Stage, running: list[subprocess.Popen[bytes]], heard: Sequence[int]) -> int:
    """Runs the recipe in a process of its own; returns its exit code, or 128 + the signal that came.

    The folder that a program makes is renamed into place once it is whole.
    """
    making = stage.folder
    if stage.config is None:
        write_atomically(stage.file, json.dumps(stage.words))
        words = list(stage.words)
        if stage.output == stage.folder:
            making = stage.folder.with_name(f".making-{stage.name}")
            shutil.rmtree(making, ignore_errors=True)
            # The lookahead spares paths of stages whose names begin with this one's.
            words = [re.sub(f"{re.escape(str(stage.folder))}(?![^/])", str(making), word) for word in words]
    else:
        write_atomically(stage.file, dump_config(stage.config), mode=0o600)
        words = [str(stage.file)]
    boot = [sys.executable, "-P", "-c", BOOT, json.dumps(sys.path), stage.recipe.module, *words]
    # In a session of its own: Ctrl-C reaches only the pipeline, which passes it on once.
    child = subprocess.Popen(
        boot, env={**os.environ, "COHORT_LAUNCHED": str(os.getpid())}, start_new_session=True
    )
    running[:] = [child]
    if heard:  # while it was being started
        child.send_signal(heard[0])
    if code := child.wait():
        return 128 - code if code < 0 else code
    if making != stage.folder:
        os.rename(making, stage.folder)
    if not stage.output.exists():
        raise RuntimeError(f"stage {stage.name} ended with exit code 0, but {stage.output} is missing")
    return 128 + heard[0] if heard else 0


if __name__ == "__main__":
    sys.exit(main())
