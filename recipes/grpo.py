"""GRPO: `accelerate launch -m recipes.grpo recipes/configs/NAME.yaml key=value ...`, or `cohort train CONFIG
...`.

Wires task + rewards + engine + policy from one config and runs `rl.train.train`. Started again with the same
run_dir it goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from datasets import disable_progress_bars
from transformers.utils.logging import disable_progress_bar

from recipes.heldout import make_evaluator
from recipes.kinds import kind_of
from recipes.models import resolve_model
from recipes.program import make_deterministic, recipe_main, run_program, share_start
from recipes.sources import make_source
from recipes.tasks import find_modules_beside
from recipes.tasks.prompts import grader_columns, load_sets, make_prompts, without
from rewards.pool.pool import RewardPool, RewardSpec
from rl.config import Config, ModelConfig, check_processes
from rl.config.read import load_config
from rl.driver import Progress, go_on
from rl.model.saving import check_saving
from rl.optimizer import make_optimizer
from rl.phases import Phases, StopSignal
from rl.references import make_reference
from rl.report.display import Display
from rl.report.observer import RunObserver
from rl.report.safe_stream import say
from rl.run import Run
from rl.store.checkpoint import CheckpointStore
from rl.store.folder import EvaluationLog, claim_inputs, heldout_ends, read_result, write_result
from rl.store.inputs import fingerprints
from rl.store.ledger import Ledger
from rl.store.metrics import MetricsLog
from rl.train import train
from rl.types import Prompt
from rl.world import World
from rollout.chat import end_token_ids
from rollout.prompts import PromptStream


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; the exit code is `recipe_main`'s."""

    def run(arguments: list[str], stop: StopSignal, began: float) -> int:
        find_modules_beside(arguments[0])
        config = load_config(arguments[0], arguments[1:])
        # Their bars break up the panel; the display says what is waited for. Downloads keep theirs.
        disable_progress_bar()
        disable_progress_bars()
        return run_program(
            config,
            stop,
            check=lambda world: check_processes(config, world.size),
            build=lambda world, display: build(config, world, stop, display, began),
            train=train,
            conclude=conclude,
            engine_timeout_s=config.engine.timeout_s,
        )

    return recipe_main("recipes.grpo", argv, run)


def conclude(run: Run, steps: int) -> None:
    """Writes and prints the results; those of a run that was finished before stay as they are."""
    config, evaluations = run.config, run.evaluations.read()
    result = read_result(config.run_dir)
    if run.progress.start_step < steps or result.get("steps") != steps:
        result = write_result(config, evaluations, steps=steps, seconds=run.progress.seconds)
    if config.evaluation.data is not None:
        ends, missing = heldout_ends({e.step: e for e in evaluations}, steps, "evaluation.jsonl")
        for name, found in ends.items():
            text = str(found) if found else f"missing ({missing[f'{name}_missing']})"
            say(f"held-out {name.removeprefix('heldout_')}: {text}")
    say(f"{steps} steps in {result['seconds']:.0f} s; results in {run.config.run_dir}/result.json")


def build(config: Config, world: World, stop: StopSignal, display: Display, began: float) -> tuple[Run, Any]:
    """A Run from its config, put back to its newest checkpoint, and the function that ends engine, graders
    and trackers.

    Cheap checks come first: config, dataset columns and rewards are refused before any model is loaded.
    """
    make_deterministic(config.train.seed, kernels=config.train.deterministic)
    kind, phases = kind_of(config), Phases(display.phase)
    kind.check(config)
    with ExitStack() as closing:
        scorer = make_scorer(config)
        closing.callback(scorer.close)
        inputs = read_inputs(config, scorer, world, display)
        model, longest = inputs.model, inputs.longest
        with display.phase("the model to load"):
            policy = kind.policy(config, model, world.accelerator, inputs.tokenizer, longest, display.note)
        share_start(policy, world)
        moves = config.model.reference.update_every > 0
        reference = make_reference(policy, moves=moves) if config.loss.kl_coef > 0 else None
        ends = end_token_ids(inputs.tokenizer, (), policy.model.generation_config)
        with display.phase(f"the engine to start ({config.engine.name})"):
            engine = kind.engine(config, model, policy, longest, display.note)
        closing.callback(engine.close)
        stream = PromptStream(inputs.prompts, seed=config.train.seed, shuffle=config.data.shuffle)
        source = make_source(config, world, engine, scorer, stream, ends, phases)
        closing.callback(source.close)
        kind.try_out(config, policy, reference, display.note)
        observer = RunObserver(display, config, is_main=world.is_main)
        closing.callback(observer.close)
        heldout = inputs.heldout
        run = Run(
            config=config,
            world=world,
            policy=policy,
            reference=reference,
            optimizer=make_optimizer(policy.trainable(), config.optimizer),
            source=source,
            measure=make_evaluator(config, world, engine, scorer, heldout, ends) if heldout else None,
            store=CheckpointStore(config.run_dir / "checkpoints", keep=config.checkpoint.keep),
            ledger=Ledger(config.run_dir, world.rank, world.size),
            log=MetricsLog(config.run_dir, own=kind.metrics),
            evaluations=EvaluationLog(config.run_dir),
            observer=observer,
            phases=phases,
            stop=stop,
            progress=Progress(began=began),
        )
        closing.callback(run.log.close)
        closing.callback(run.evaluations.close)
        _go_on(run, observer)
        if world.is_main and run.progress.step < config.train.steps:
            check_saving(policy, run.store.root, adapter=config.model.lora is not None)
        return run, closing.pop_all().close


@dataclass(frozen=True)
class Inputs:
    """What a run begins with. `longest`: tokens of the longest prompt with the completion that may follow."""

    model: ModelConfig
    tokenizer: Any
    prompts: list[Prompt]
    heldout: list[Prompt]
    longest: int


def read_inputs(config: Config, scorer: RewardPool, world: World, display: Display) -> Inputs:
    """Prompts of training and held-out ones, rendered; rows, tokenizer and model are those the run began
    with.
    """
    held = config.heldout_data
    rows, heldout_rows = load_sets(config, display.note)
    scorer.check_columns(*grader_columns(config.data, rows))
    if held:
        scorer.check_columns(*grader_columns(held, heldout_rows))
    model = config.model.model_copy(update={"name": resolve_model(config.model.name)})
    tokenizer = kind_of(config).tokenizer(config, model)
    if world.is_main:
        sections = {"data": rows, "evaluation data": heldout_rows if held else None}
        names = [spec.name for spec in config.rewards.functions]
        found = fingerprints(model.name, tokenizer, sections, revision=model.revision, rewards=names)
        claim_inputs(config, found, display.warn)
    said = {"template_file": model.chat_template, "note": display.note}
    heldout = make_prompts(held, heldout_rows, tokenizer, "heldout", **said) if held else []
    prompts = without(make_prompts(config.data, rows, tokenizer, "train", **said), heldout, display.note)
    return Inputs(model, tokenizer, prompts, heldout, _longest(config, prompts, heldout))


def _go_on(run: Run, observer: RunObserver) -> None:
    rows = run.log.read() if run.world.is_main else []
    (num_done,) = run.world.max([float(max((row["step"] for row in rows), default=0))])
    run.num_recorded = int(run.world.max([float(run.ledger.expect(int(num_done)))])[0])
    loaded = go_on(run)
    if loaded is None:
        return
    if run.world.is_main:
        observer.goes_on([row for row in rows if row["step"] <= loaded.step])
        for e in run.evaluations.read():
            observer.display.heldout(e.step, e.accuracy, e.low, e.high, from_before=True)
    observer.note(f"going on from {loaded.path} (step {loaded.step})")


def reward_specs(config: Config) -> list[RewardSpec]:
    return [RewardSpec(s.name, s.weight, s.requires, s.options, s.clip) for s in config.rewards.functions]


def make_scorer(config: Config) -> RewardPool:
    r = config.rewards
    specs = reward_specs(config)
    return RewardPool(
        specs,
        workers=r.workers,
        deadline_s=r.deadline_s,
        memory_bytes=int(r.memory_gib * 2**30),
        num_steps=config.train.steps,
    )


def _longest(config: Config, prompts: list[Prompt], heldout: list[Prompt]) -> int:
    """Tokens of the longest prompt with the completion that may follow it."""
    sets = [(prompts, config.sampling), (heldout, config.evaluation.sampling)]
    return max(len(p.token_ids) + sampling.max_completion_length for some, sampling in sets for p in some)


def longest_sequence(config: Config) -> int:
    """Tokens of the longest prompt with the longest completion, of training and evaluation."""
    sections = [(config.data, config.sampling)]
    if config.heldout_data:
        sections.append((config.heldout_data, config.evaluation.sampling))
    return max(data.max_prompt_length + sampling.max_completion_length for data, sampling in sections)


if __name__ == "__main__":
    sys.exit(main())
