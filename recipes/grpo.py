"""GRPO: `accelerate launch -m recipes.grpo recipes/configs/NAME.yaml key=value ...`, or `cohort train CONFIG
...`.

It wires task, rewards, engine and policy from one config and runs `rl.train.train`. Started again with the
same run_dir, it resumes where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

from recipes.engines import ENGINE_LOG, begin_imports, naming, said_of_start, size_of, started_into
from recipes.environments.wiring import open_environment, playing, schema_hash, tool_metrics, with_tools
from recipes.environments.workers import Workers
from recipes.evaluation.heldout import make_evaluator
from recipes.finished import is_finished
from recipes.fit import Fitted, fit_to_cards
from recipes.kinds import kind_of, make_models
from recipes.models import open_adapter, resolve_model, teacher_model, teacher_server
from recipes.program import (
    Laps,
    call_program,
    check_replay,
    first_line,
    make_deterministic,
    recipe_main,
    refuse_reimport,
    run_program,
    without_change,
)
from recipes.sources import make_scorer, make_source
from recipes.tasks import find_modules_beside
from recipes.tasks.demonstrations import longest_taught
from recipes.tasks.many import longest_row, train_prompts
from recipes.tasks.overlap import settle_overlap
from recipes.tasks.prompts import check_braces, check_rewards, load_sets, make_prompts
from rewards.functions import Origins, name_functions, origin_of, sources_of
from rewards.plugins import reward_names
from rewards.pool.pool import RewardPool
from rl.config import Config, ModelConfig
from rl.config.read import load_config, run_tree, validated_run
from rl.driver import Progress, go_on
from rl.model.loading import base_of, check_config
from rl.model.saving import check_saving
from rl.optimizer import make_optimizer
from rl.phases import Phases, StopSignal
from rl.report.display import Display
from rl.report.observer import RunObserver
from rl.report.safe_stream import say
from rl.report.verdict import judge_run
from rl.run import Run
from rl.store.checkpoint import CheckpointStore
from rl.store.folder import claim_inputs, evaluation_log, heldout_ends, read_result, write_result
from rl.store.inputs import file_fingerprints, fingerprints
from rl.store.ledger import Ledger
from rl.store.metrics import MetricsLog
from rl.teacher import check_tokenizers
from rl.train import train
from rl.types import Prompt
from rl.world import World
from rollout.chat import end_token_ids
from rollout.engine import Engine
from rollout.prompts import PromptStream


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; returns the exit code of `recipe_main`."""

    def work(arguments: list[str], stop: StopSignal, began: float) -> int:
        (path, *overrides), change = without_change(arguments)
        find_modules_beside(path)
        config = load_config(path, overrides, rewards=reward_names())
        return _train(config, stop, began, {}, change=change)

    return recipe_main("recipes.grpo", argv, work)


def run(
    config: str | Path | Mapping[str, Any] | Config,
    rewards: Mapping[str, Callable[..., Any]] | None = None,
    *,
    change: bool = False,
    **overrides: Any,
) -> dict[str, Any]:
    """Trains as `cohort train` does, from a script or a notebook; returns what `result.json` holds.

    The same call again resumes where the run stopped. A script needs no `if __name__ == "__main__":`.

    Args:
        config: the path of a YAML file, a dict of its form, or a `Config`.
        rewards: functions by the names that the config's `rewards.functions` gives them; if it names none,
            these are the rewards. Graders are killable processes: they import a script's function again, and
            are sent the source of a notebook's (`rewards.functions`).
        change: allows a resumed run another learning rate and such (`rl.config.resume`).
        overrides: sections, such as train={"steps": 20}, or keys, such as **{"optimizer.lr": 1e-5}.

    Raises:
        ValueError: a fault that the user can fix, in the words of `cohort train`.
        KeyboardInterrupt: on Ctrl-C, once the step is saved; on a second one, at once.
    """
    refuse_reimport()
    tree = run_tree(config, overrides)
    origins = {name: origin_of(name, fn) for name, fn in (rewards or {}).items()}
    name_functions(tree, origins)
    is_file = isinstance(config, str | Path)
    find_modules_beside(config if is_file else Path.cwd() / "config.yaml")
    known = [*reward_names(), *origins]
    checked = validated_run(tree, config if is_file else None, rewards=known)
    call_program(lambda stop, began: _train(checked, stop, began, origins, change=change))
    return read_result(checked.run_dir)


def _train(config: Config, stop: StopSignal, began: float, origins: Origins, *, change: bool) -> int:
    # Progress bars break up the display, which names each wait. Downloads keep theirs.
    disable_progress_bar()
    if is_finished(config):
        return 0
    return run_program(
        stop,
        settle=lambda world: fit_to_cards(config, world),
        build=partial(build, stop=stop, began=began, origins=origins),
        train=_train_steps,
        conclude=conclude,
        engine_timeout_s=config.engine.timeout_s,
        change=change,
        judged=True,
    )


def _train_steps(run: Run) -> int:
    with naming(run.config.run_dir / ENGINE_LOG, is_own=run.config.engine.name != "server"):
        return train(run)


def conclude(run: Run, steps: int) -> None:
    """Writes and prints the results; those of a run that had already finished are kept."""
    config, evaluations = run.config, run.evaluations.read()
    result = read_result(config.run_dir)
    if run.progress.start_step < steps or result.get("steps") != steps:
        ends = {"steps": steps, "seconds": run.progress.seconds, "checkpoint": run.store.path(steps)}
        result = write_result(config, evaluations, verdict=judge_run(config.run_dir).headline, **ends)
    if config.evaluation.data is not None:
        ends, missing = heldout_ends(evaluations, steps, "evaluation.jsonl")
        for name, found in ends.items():
            text = str(found) if found else f"missing ({missing[f'{name}_missing']})"
            say(f"held-out {name.removeprefix('heldout_')}: {text}")
    say(f"{steps} steps in {result['seconds']:.0f} s; results in {run.config.run_dir}/result.json")


def build(
    fitted: Fitted, world: World, display: Display, *, stop: StopSignal, began: float, origins: Origins
) -> tuple[Run, Any]:
    """A Run from its config, restored to its newest checkpoint, and a function that closes its engine,
    graders and trackers.

    Cheap checks come first: config, dataset columns and rewards are refused before any model is loaded.
    """
    config: Config = fitted.config
    make_deterministic(config.train.seed, kernels=config.train.deterministic)
    kind, phases, lap = kind_of(config), Phases(display.phase), Laps(began)
    kind.check(config)
    display.hold()
    if (arm := config.rewards.control) != "none":
        display.warn(f"control arm: rewards.control={arm} ignores right answers; compare with control=none")
    with ExitStack() as closing:
        closing.callback(begin_imports(config))
        scorer = make_scorer(config, origins)
        closing.callback(scorer.close)
        inputs = read_inputs(config, scorer, world=world, display=display, closing=closing, stop=stop)
        lap("data and graders")
        given = {"tokenizer": inputs.tokenizer, "longest": (inputs.longest, inputs.longest_taught)}
        policy, reference, teacher = make_models(config, inputs.model, world=world, display=display, **given)
        with display.phase("a full micro-batch to be tried"):
            fitted.compare(kind.try_out(config, policy, reference, teacher), display.note)
        ends = end_token_ids(inputs.tokenizer, (), policy.model.generation_config)
        engine = _started(config, inputs, policy, display=display, lap=lap, rank=world.rank, stop=stop)
        closing.callback(engine.close)
        display.head(first_line(config, policy, rows=len(inputs.prompts), engine=engine.name))
        stream = PromptStream(inputs.prompts, seed=config.train.seed, shuffle=config.data.shuffle)
        parts = {"engine": engine, "scorer": scorer, "ends": ends}
        source = make_source(config, world, stream=stream, phases=phases, **parts)
        closing.callback(source.close)
        observer = RunObserver(display, config, is_main=world.is_main, each_step=kind.each_step(policy))
        closing.callback(observer.close)
        hosted = config.memory.optimizer_on_host is True
        run = Run(
            config=config,
            world=world,
            policy=policy,
            reference=reference,
            teacher=teacher,
            optimizer=make_optimizer(policy.trainable(), config.optimizer, hosted=hosted),
            source=source,
            measure=make_evaluator(config, world, prompts=inputs.heldout, **parts),
            store=CheckpointStore(config.run_dir / "checkpoints", keep=config.checkpoint.keep),
            ledger=Ledger(config.run_dir, world.rank, world.size),
            log=MetricsLog(config.run_dir, own=[*kind.metrics, *tool_metrics(inputs.environment)]),
            evaluations=evaluation_log(config.run_dir),
            observer=observer,
            phases=phases,
            stop=stop,
            progress=Progress(began=began),
        )
        closing.callback(run.log.close)
        closing.callback(run.evaluations.close)
        _go_on(run, observer)
        _check_saving(run, policy)
        observer.note(lap("other"))
        return run, closing.pop_all().close


def _started(
    config: Config, inputs: Inputs, policy: Any, *, display: Display, lap: Laps, rank: int, stop: StopSignal
) -> Engine:
    """The engine with the policy's weights, in the environment of the run."""
    lap("policy")
    waiting, log = display.phase(f"the engine to start ({config.engine.name})"), config.run_dir / ENGINE_LOG
    begin, is_own = size_of(log), config.engine.name != "server"
    # A first server may be long in coming: that is said at once, and nothing is lost if the run ends.
    note = display.note if is_own else display.say
    with waiting, nullcontext() if is_own else stop.at_once():
        make = partial(kind_of(config).engine, config, inputs.model, policy, inputs.longest, note)
        engine = started_into(log, make, note, is_own=is_own)
    lap("engine", said_of_start(log, begin))
    if config.memory.engine_sleeps is True and not engine.sleeps_while_training:
        display.note("memory.engine_sleeps has no effect: only a vLLM of this run can release memory")
    own = {"config": config, "tokenizer": inputs.tokenizer, "model": inputs.model, "rank": rank}
    return playing(engine, inputs.environment, **own)


@dataclass(frozen=True)
class Inputs:
    """What a run begins with. `longest` counts the most tokens that the policy reads with a completion,
    `longest_taught` those that the teacher reads with a demonstration (0 without any).
    """

    model: ModelConfig
    tokenizer: Any
    prompts: Sequence[Prompt]
    heldout: list[Prompt]
    longest: int
    longest_taught: int
    environment: Workers | None


def read_inputs(
    config: Config,
    scorer: RewardPool,
    *,
    world: World,
    display: Display,
    closing: ExitStack,
    stop: StopSignal,
) -> Inputs:
    """Renders training and held-out prompts; refuses rows, a tokenizer or a model other than those the run
    began with. `closing` closes the environment.
    """
    environment = open_environment(config, closing)
    held = config.heldout_data
    rows, heldout_rows = (with_tools(some, environment) for some in load_sets(config, display.note))
    check_rewards(scorer, config.data, rows, display.warn)
    if held:
        key = None if held.template == config.data.template else "evaluation.data.template"
        check_rewards(scorer, held, heldout_rows, display.warn, key=key)
    if config.teacher is not None:
        shown = {"key": "teacher.template", "replaced": ("demonstration", "prompt")}
        check_braces(config.teacher.template, rows, display.warn, **shown)
    named = config.model.model_copy(update={"name": resolve_model(config.model.name)})
    model = open_adapter(named, config.run_dir, world, display.note) if type(config) is Config else named
    tokenizer = kind_of(config).tokenizer(config, model)
    teacher = teacher_model(config.teacher)
    server = teacher_server(config.teacher, config.run_dir if world.is_main else None)
    if server is not None:
        # The first signal ends a wait: nothing is lost.
        with stop.at_once(), display.phase("the teacher's server to answer"):
            server.wait(display.say)
    if teacher is not None:
        check_tokenizers(teacher, tokenizer, config.longest_sequence)
    if world.is_main:
        sections = {"data": rows, "evaluation data": heldout_rows if held else None}
        names = [spec.name for spec in config.rewards.functions]
        found = fingerprints(named.name, tokenizer, sections, revision=named.revision, rewards=names)
        if (base := base_of(named)) is not named:
            found["base model"] = _fingerprint(base)
        if teacher is not None:
            found["teacher"] = _fingerprint(base_of(teacher)) | _fingerprint(teacher)
        elif config.teacher is not None:
            found["teacher"] = {"model": server.model()[0] if server else "the policy"}
        found["rewards"] |= sources_of(scorer.specs)
        found |= file_fingerprints({"moe.trained_experts": config.moe.trained_experts})
        if environment is not None:
            found["environment"] = {"tools": schema_hash(environment.tools)}
        claim_inputs(config, found, display.warn)
    said = {"template_file": model.chat_template, "note": display.note}
    heldout = make_prompts(held, heldout_rows, tokenizer, "heldout", **said) if held else []
    rows = settle_overlap(config, rows, heldout_rows, display.warn)
    prompts = train_prompts(config, rows, heldout, tokenizer, **said)
    longest, taught = longest_row(config, prompts, heldout), longest_taught(config, prompts)
    longest = max(longest, taught) if teacher is None and server is None else longest
    if teacher is not None and taught:
        check_config(teacher, tokenizer, taught)
    if server is not None and config.teacher is not None:
        server.check(tokenizer, max(taught, config.longest_row), config.teacher.asked_ids)
    return Inputs(model, tokenizer, prompts, heldout, longest, taught, environment)


def _fingerprint(model: ModelConfig) -> dict[str, str]:
    return fingerprints(model.name, None, {}, revision=model.revision).get("model", {})


def _go_on(run: Run, observer: RunObserver) -> None:
    check_replay(run.world, run.policy)
    rows = run.log.read() if run.world.is_main else []
    (num_done,) = run.world.max([float(max((row["step"] for row in rows), default=0))])
    run.num_recorded = int(run.world.max([float(run.ledger.expect(int(num_done)))])[0])
    loaded = go_on(run)
    if loaded is None:
        return
    if run.world.is_main:
        observer.goes_on([row for row in rows if row["step"] <= loaded.step])
        for e in run.evaluations.read().values():
            observer.display.heldout(e.step, e.accuracy, e.low, e.high, from_before=True)
    observer.note(f"going on from {loaded.path} (step {loaded.step})")


def _check_saving(run: Run, policy: Any) -> None:
    config = run.config
    if not run.world.is_main or run.progress.step >= config.train.steps:
        return
    check_saving(
        policy.model,
        policy.tokenizer,
        root=run.store.root,
        adapter=config.model.lora is not None,
        keep=config.checkpoint.keep,
        reference=config.model.reference.update_every > 0 and run.reference is not None,
        warn=run.observer.warn,
    )


if __name__ == "__main__":
    sys.exit(main())
