"""GRPO: `accelerate launch -m recipes.grpo recipes/configs/NAME.yaml key=value ...`, or `cohort train CONFIG
...`.

Wires task + rewards + engine + policy from one config and runs `rl.train.train`. Started again with the same
run_dir it goes on where it stopped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from datasets import disable_progress_bars
from transformers.utils.logging import disable_progress_bar

from recipes.diffusion_rl import check_canvas, make_masked_engine, make_masked_policy
from recipes.engines import make_engine
from recipes.heldout import make_evaluator
from recipes.launch import recipe_main
from recipes.models import resolve_model
from recipes.sources import make_source
from recipes.tasks import find_modules_beside
from recipes.tasks.prompts import grader_columns, load_sets, make_prompts, without
from rewards.pool.pool import RewardPool, RewardSpec
from rl.config import Config, ModelConfig, check_processes
from rl.config.diffusion_rl import MaskedRunConfig
from rl.config.read import load_config
from rl.diffusion.saved_config import refuse_masked
from rl.diffusion.tokenizer import load_diffusion_tokenizer
from rl.model.loading import check_config, load_tokenizer
from rl.model.saving import check_saving
from rl.phases import Phases, StopSignal
from rl.plan.memory import GIB, probe
from rl.policy import Policy
from rl.report.display import Display
from rl.report.observer import RunObserver
from rl.report.report import build_report
from rl.report.safe_stream import say
from rl.resume import go_on, resume
from rl.run import Run
from rl.store.checkpoint import CheckpointStore
from rl.store.durable import RunLock
from rl.store.folder import (
    EvaluationLog,
    check_whole,
    claim_config,
    claim_inputs,
    heldout_ends,
    read_result,
    write_result,
)
from rl.store.inputs import fingerprints
from rl.store.ledger import Ledger
from rl.store.manifest import unsupported_versions
from rl.store.metrics import MetricsLog
from rl.train import train
from rl.types import Prompt
from rl.update import pack_rules, weight_decay_groups
from rl.world import World, make_accelerator
from rollout.chat import end_token_ids
from rollout.engine import Engine
from rollout.source import PromptStream


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; the exit code is `recipe_main`'s."""

    def run(arguments: list[str], stop: StopSignal, began: float) -> int:
        find_modules_beside(arguments[0])
        return _run(load_config(arguments[0], arguments[1:]), stop, began)

    return recipe_main("recipes.grpo", argv, run)


def _run(config: Config, stop: StopSignal, began: float) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Their bars break up the panel; the display says what is waited for. Downloads keep theirs.
    disable_progress_bar()
    disable_progress_bars()
    accelerator = make_accelerator(config.engine.timeout_s)
    world = World(accelerator)
    stop.any_process = world.any
    check_processes(config, world.size)
    if (kind := accelerator.distributed_type) in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"accelerate is set up for {kind.value}, and this release keeps a whole copy of the weights "
            "in every process; launch with --multi_gpu, or use model.lora for a larger model"
        )
    with RunLock(config.run_dir) if world.is_main else nullcontext():
        code = _locked_run(config, world, stop, began)
    world.end()
    return code


def _locked_run(config: Config, world: World, stop: StopSignal, began: float) -> int:
    if world.is_main:
        claim_config(config)
    world.wait()
    display = Display(config.train.steps, is_main=world.is_main)
    with display:
        for sentence in unsupported_versions():
            display.warn(sentence)
        if (sentence := world.exposure()) is not None:
            display.note(sentence)
        run, close = build(config, world, stop, display, began)
        try:
            steps = train(run)
        finally:
            close()
    stopped = steps < config.train.steps
    if world.is_main:
        check_whole(config.run_dir, first=run.start_step, last=steps)
        if not stopped:
            _conclude(run, steps)
        say(f"report: {build_report(config.run_dir)}")
        if stopped:
            say(f"stopped after step {steps} of {config.train.steps}; the same command goes on from there")
    return stop.exit_code() if stopped else 0


def _conclude(run: Run, steps: int) -> None:
    """Writes and prints the results; those of a run that was finished before stay as they are."""
    config, evaluations = run.config, run.evaluations.read()
    result = read_result(config.run_dir)
    if run.start_step < steps or result.get("steps") != steps:
        result = write_result(config, evaluations, steps=steps, seconds=run.seconds)
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
    _make_deterministic(config)
    check_canvas(config)
    phases = Phases(display.phase)
    held = config.heldout_data
    rows, heldout_rows = load_sets(config, display.note)
    with ExitStack() as closing:
        scorer = make_scorer(config)
        closing.callback(scorer.close)
        scorer.check_columns(*grader_columns(config.data, rows))
        if held:
            scorer.check_columns(*grader_columns(held, heldout_rows))
        model = config.model.model_copy(update={"name": resolve_model(config.model.name)})
        tokenizer = _load_tokenizer(config, model)
        if world.is_main:
            sections = {"data": rows, "evaluation data": heldout_rows if held else None}
            names = [spec.name for spec in config.rewards.functions]
            found = fingerprints(model.name, tokenizer, sections, revision=model.revision, rewards=names)
            claim_inputs(config, found, display.warn)
        said = {"template_file": model.chat_template, "note": display.note}
        heldout = make_prompts(held, heldout_rows, tokenizer, "heldout", **said) if held else []
        prompts = without(make_prompts(config.data, rows, tokenizer, "train", **said), heldout, display.note)
        longest = _longest(config, prompts, heldout)
        with display.phase("the model to load"):
            policy = _make_policy(config, model, world.accelerator, tokenizer, longest)
        if (reason := policy.settle_attention(longest)) is not None:
            display.note(
                f"packed attention is off: {reason}; sequences are trained one at a time, with the same "
                "result"
            )
        if world.size > 1:
            for _, parameter in policy.trainable():
                torch.distributed.broadcast(parameter.data, 0)
        ends = end_token_ids(tokenizer, (), policy.model.generation_config)
        with display.phase(f"the engine to start ({config.engine.name})"):
            engine = _make_engine(config, model, policy, longest, display)
        closing.callback(engine.close)
        stream = PromptStream(prompts, seed=config.train.seed, shuffle=config.data.shuffle)
        source = make_source(config, world, engine, scorer, stream, ends, phases)
        closing.callback(source.close)
        if policy.device.type == "cuda" and not isinstance(config, MaskedRunConfig):
            peak = probe(policy, config, pack_rules(config, share_prompts=policy.shares_prompts))
            display.note(f"a full micro-batch of the longest completions holds {peak / GIB:.1f} GiB")
        observer = RunObserver(display, config, is_main=world.is_main)
        closing.callback(observer.close)
        run = Run(
            config=config,
            world=world,
            policy=policy,
            optimizer=make_optimizer(config, policy),
            source=source,
            evaluate=make_evaluator(config, world, engine, scorer, heldout, ends) if heldout else None,
            store=CheckpointStore(config.run_dir / "checkpoints", keep=config.checkpoint.keep),
            ledger=Ledger(config.run_dir, world.rank, world.size),
            log=MetricsLog(config.run_dir),
            evaluations=EvaluationLog(config.run_dir),
            observer=observer,
            phases=phases,
            stop=stop,
            began=began,
        )
        closing.callback(run.log.close)
        closing.callback(run.evaluations.close)
        _go_on(run, observer)
        if world.is_main and run.start_step < config.train.steps:
            check_saving(policy, run.store.root, adapter=config.model.lora is not None)
        return run, closing.pop_all().close


def _load_tokenizer(config: Config, model: ModelConfig) -> Any:
    if isinstance(config, MaskedRunConfig):
        return load_diffusion_tokenizer(model)
    refuse_masked(model.name, model.revision)
    return load_tokenizer(model)


def _make_policy(
    config: Config, model: ModelConfig, accelerator: Accelerator, tokenizer: Any, longest: int
) -> Policy:
    if isinstance(config, MaskedRunConfig):
        return make_masked_policy(config, model, accelerator, longest)
    check_config(model, tokenizer, longest)
    with_reference = config.loss.kl_coef > 0
    temperature = config.sampling.temperature
    return Policy(model, accelerator, temperature=temperature, with_reference=with_reference)


def _make_engine(
    config: Config, model: ModelConfig, policy: Policy, longest: int, display: Display
) -> Engine:
    if isinstance(config, MaskedRunConfig):
        return make_masked_engine(config, model, policy, dtype=_engine_dtype(config))
    return make_engine(
        config.engine,
        model.name,
        tokenizer=policy.tokenizer,
        dtype=_engine_dtype(config),
        device=policy.device,
        max_model_length=max(longest, len(policy.canary_ids) + 1),
        max_num_seqs=config.max_num_seqs,
        revision=model.revision,
        note=display.note,
        trained=policy.model,
        sample_while_training=config.train.sample_while_training,
        attention=policy.own_attention,
        long_factors=policy.long_factors,
    )


def _go_on(run: Run, observer: RunObserver) -> None:
    rows = run.log.read() if run.world.is_main else []
    (num_done,) = run.world.max([float(max((row["step"] for row in rows), default=0))])
    run.num_recorded = int(run.world.max([float(run.ledger.expect(int(num_done)))])[0])
    loaded = go_on(run, resume, run.evaluations)
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


def make_optimizer(config: Config, policy: Policy) -> torch.optim.Optimizer:
    o = config.optimizer
    groups = weight_decay_groups(policy, o.weight_decay)
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)


def _engine_dtype(config: Config) -> torch.dtype:
    if config.engine.dtype != "auto":
        return getattr(torch, config.engine.dtype)
    return torch.float32 if config.model.dtype == "fp32" else torch.bfloat16


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


def _make_deterministic(config: Config) -> None:
    torch.manual_seed(config.train.seed)
    if config.train.deterministic and not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(main())
