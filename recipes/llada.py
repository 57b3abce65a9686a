"""Diffusion language models: `accelerate launch -m recipes.llada recipes/configs/NAME.yaml key=value ...`.

It pre-trains (rows with `text`) or fine-tunes (prompts and answers) LLaDA, or a causal model that becomes a
diffusion model on the way. Started again with the same run_dir, it resumes where it stopped.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from recipes.fit import Fitted, fit_to_cards
from recipes.models import resolve_model
from recipes.program import (
    first_line,
    make_deterministic,
    recipe_main,
    run_program,
    without_change,
)
from recipes.tasks import find_modules_beside, load_rows
from recipes.tasks.prompts import check_braces
from rl.config.diffusion import DiffusionConfig, EosConfig, TextConfig
from rl.config.read import read_config
from rl.diffusion.likelihood import bound_log
from rl.diffusion.model import is_shifted
from rl.diffusion.policy import DiffusionPolicy
from rl.diffusion.saved_config import raw_config
from rl.diffusion.text import Encoded, encode_rows, padded_examples, padded_length, padding_ids, row_format
from rl.diffusion.train import DiffusionRun, train
from rl.driver import Progress, go_on
from rl.model.loading import check_not_quantised
from rl.model.saving import check_saving
from rl.optimizer import make_optimizer
from rl.phases import Phases, StopSignal
from rl.report.display import Display
from rl.report.observer import RunObserver
from rl.report.safe_stream import say
from rl.sharded import ShardedPolicy
from rl.store.checkpoint import CheckpointStore
from rl.store.folder import claim_inputs, heldout_ends, write_atomically
from rl.store.inputs import fingerprints
from rl.store.metrics import MetricsLog
from rl.world import World
from rollout.template import check_template


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; returns the exit code of `recipe_main`."""

    def run(arguments: list[str], stop: StopSignal, began: float) -> int:
        (path, *overrides), change = without_change(arguments)
        find_modules_beside(path)
        config = read_config(DiffusionConfig, path, overrides)
        return run_program(
            stop,
            settle=lambda world: settle(config, world),
            build=lambda fitted, world, display: build(
                fitted.config, world, stop=stop, display=display, began=began
            ),
            train=train,
            conclude=conclude,
            change=change,
        )

    return recipe_main("recipes.llada", argv, run)


def settle(config: DiffusionConfig, world: World) -> Fitted:
    """The config with values for `auto`; raises ValueError if weights cannot be split over processes."""
    if config.train.shard and world.size == 1:
        raise ValueError("train.shard=true splits the weights over processes, but there is one; launch more")
    return fit_to_cards(config, world)


def conclude(run: DiffusionRun, steps: int) -> None:
    """Writes and prints the results of this process."""
    seconds = run.progress.seconds
    write_result(run, steps=steps, seconds=seconds)
    say(f"{steps} steps in {seconds:.0f} s; results in {run.config.run_dir}/result.json")


def build(
    config: DiffusionConfig, world: World, *, stop: StopSignal, display: Display, began: float
) -> tuple[DiffusionRun, Any]:
    """A run from its config, restored to its newest checkpoint, and a function that closes what it opened."""
    make_deterministic(config.train.seed, kernels=config.train.deterministic)
    display.hold()
    rows, held = load_rows(config.data.rows()), config.evaluation.data
    check_braces(config.data.template, rows, display.warn)
    heldout_rows = load_rows(held.rows()) if held else None
    share = config.objective.random_length_share
    if share and row_format(rows, config.data) != "text":
        raise ValueError(
            f"objective.random_length_share={share} is for pre-training on rows with 'text'; these have "
            "prompts, and a cut would remove answers: use objective.random_length_share=0"
        )
    policy: Any = _load(config, world, {"data": rows, "evaluation data": heldout_rows}, display)
    examples, padding = _examples(config, rows, policy, display)
    world.share(parameter.data for _, parameter in policy.trainable())
    if config.train.shard:
        policy = ShardedPolicy(policy, None, sharding="full", sent=torch.float32)
    display.head(first_line(config, policy, rows=len(examples), engine=""))
    observer = RunObserver(display, config, is_main=world.is_main, judged=False)
    run = DiffusionRun(
        config=config,
        world=world,
        policy=policy,
        optimizer=make_optimizer(policy.trainable(), config.optimizer),
        examples=examples,
        padding=padding,
        heldout=_heldout(held, heldout_rows, policy),
        store=CheckpointStore(config.run_dir / "checkpoints", keep=config.checkpoint.keep),
        log=MetricsLog(config.run_dir),
        bounds=bound_log(config.run_dir),
        observer=observer,
        phases=Phases(display.phase),
        stop=stop,
        progress=Progress(began=began),
    )
    if (loaded := go_on(run)) is not None:
        display.note(f"going on from {loaded.path} (step {loaded.step})")
    if world.is_main and run.progress.step < config.train.steps:
        keep, adapter = config.checkpoint.keep, config.model.lora is not None
        own = {"adapter": adapter, "keep": keep, "warn": display.warn}
        check_saving(policy.model, policy.tokenizer, root=run.store.root, **own)
    closing = ExitStack()
    closing.callback(run.log.close)
    closing.callback(run.bounds.close)
    closing.callback(observer.close)
    return run, closing.close


def _load(
    config: DiffusionConfig, world: World, sections: dict[str, Any], display: Display
) -> DiffusionPolicy:
    """Loads the policy; refuses a model, tokenizer or rows other than those the run began with."""
    name = resolve_model(config.model.name)
    check_not_quantised(raw_config(name, config.model.revision).get("quantization_config"), name)
    policy = DiffusionPolicy(config.model, world.accelerator, name=name)
    if row_format(sections["data"], config.data) != "text":
        check_template(policy.tokenizer, file=config.model.chat_template)
    if world.is_main:
        found = fingerprints(name, policy.tokenizer, sections, revision=config.model.revision)
        claim_inputs(config, found, display.warn)
    for section in filter(None, (config.data, config.evaluation.data)):
        _check_length(section, policy)
    return policy


def _examples(
    config: DiffusionConfig, rows: Any, policy: DiffusionPolicy, display: Display
) -> tuple[list[Encoded], list[int]]:
    """Encoded rows, and the cycle of ids that pads them."""
    padding = padding_ids(
        config.eos,
        policy.tokenizer,
        num_rows=policy.model.get_input_embeddings().weight.shape[0],  # type: ignore[union-attr]
        mask_token_id=policy.mask_token_id,
    )
    examples, dropped = _encoded(rows, config.data, policy)
    _check_padding(examples, config.eos, policy)
    if dropped:
        display.note(f"{dropped} examples longer than data.max_length={config.data.max_length} are left out")
    return examples, padding


def write_result(run: DiffusionRun, *, steps: int, seconds: float) -> None:
    """Writes `result.json`: seconds, steps, and the bound on held-out text before and after."""
    result: dict[str, Any] = {"steps": steps, "seconds": round(seconds, 1)}
    result["checkpoint"] = str(run.store.path(steps).relative_to(run.config.run_dir))
    if run.heldout:
        ends, missing = heldout_ends(run.bounds.read(), steps, "likelihood.jsonl")
        for name, bound in ends.items():
            result[name] = bound and {
                "nats_per_token": bound.nats_per_token,
                "error": bound.error,
                "perplexity": bound.perplexity,
                "num_tokens": bound.num_tokens,
            }
            text = str(bound) if bound else f"missing ({missing[f'{name}_missing']})"
            say(f"held-out text {name.removeprefix('heldout_')}: {text}")
        result |= missing
    write_atomically(run.config.run_dir / "result.json", json.dumps(result, indent=2) + "\n")


def _heldout(section: TextConfig | None, rows: Any, policy: DiffusionPolicy) -> Any:
    """Held-out examples end with one end-of-text token, whatever follows it in training."""
    if section is None:
        return []
    encoded, _ = _encoded(rows, section, policy)
    return padded_examples(encoded, EosConfig(policy="single"), [])


def _encoded(rows: Any, section: TextConfig, policy: DiffusionPolicy) -> tuple[list[Encoded], int]:
    return encode_rows(
        rows,
        section,
        policy.tokenizer,
        mask_token_id=policy.mask_token_id,
        shift=is_shifted(policy.model),
    )


def _check_length(section: TextConfig, policy: DiffusionPolicy) -> None:
    limit = policy.context_length
    if limit is not None and section.max_length > limit:
        raise ValueError(
            f"data.max_length={section.max_length} is beyond the model's context of {limit} tokens; use "
            f"max_length={limit} with too_long=drop"
        )


def _check_padding(examples: Sequence[Encoded], eos: EosConfig, policy: DiffusionPolicy) -> None:
    limit, longest = policy.context_length, max(len(example) for example in examples)
    padded = padded_length(longest, eos, longest)
    if limit is not None and padded > limit:
        raise ValueError(
            f"eos.multiple={eos.multiple} pads examples of up to {longest} tokens to {padded}, beyond the "
            f"model's context of {limit} tokens; use a multiple that divides {limit}, such as "
            f"{math.gcd(limit, 64)}, or eos.policy=batch_max"
        )


if __name__ == "__main__":
    sys.exit(main())
