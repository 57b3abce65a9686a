"""Rejection sampling: `cohort sample CONFIG [key=value ...]` writes verified traces that `recipes.sft` reads.

Every completion goes into a ledger. It has a record per call, written whole or not at all; a restart samples
the missing ones. `traces.parquet` is chosen from the complete ledger, so that a killed run ends with the
traces of an undisturbed one, each once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyarrow
import pyarrow.parquet

from recipes.engines import ENGINE_LOG, naming
from recipes.evaluate import generation_config, open_engine
from recipes.evaluation.evaluations import described
from recipes.models import resolve_model
from recipes.program import make_deterministic, recipe_main
from recipes.sources import make_scorer, sampling_params
from recipes.tasks import find_modules_beside, load_rows
from recipes.tasks.overlap import without_asked
from recipes.tasks.prompts import check_rewards, make_prompts, unrendered_prompt
from recipes.tasks.traces import Trace, ask_endpoint, choose, read_traces
from rewards.plugins import reward_names
from rewards.pool.pool import RewardPool
from rl.config import ModelConfig
from rl.config.read import differing, read_config
from rl.config.traces import CHOOSING, TracesConfig
from rl.diffusion.saved_config import refuse_masked
from rl.model.loading import check_config, load_tokenizer
from rl.phases import StopSignal
from rl.record import check_faults
from rl.report.safe_stream import say
from rl.store.durable import run_lock, written_whole
from rl.store.folder import claim_config, claim_inputs, read_result, write_atomically, write_config
from rl.store.inputs import Fingerprints, fingerprints
from rl.store.ledger import Ledger
from rl.store.manifest import library_versions
from rl.types import Call, Group, Prompt, ScoredGroup
from rl.world import World, make_accelerator
from rollout.chat import end_token_ids
from rollout.prompts import sampling_seed

TRACES = "traces.parquet"


@dataclass(frozen=True)
class Teacher:
    """The prompts, the function that answers them, fingerprints of both, and ids that end a completion."""

    prompts: Sequence[Prompt]
    generate: Callable[[Call], list[Group]]
    found: Fingerprints
    ends: tuple[int, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Samples; returns the exit code of `recipe_main`."""

    def run(arguments: list[str], stop: StopSignal, began: float) -> int:
        path, *overrides = arguments
        find_modules_beside(path)
        return sample(read_config(TracesConfig, path, overrides, rewards=reward_names()), stop)

    return recipe_main("recipes.rejection", argv, run)


def is_finished(config: TracesConfig) -> bool:
    """Whether the folder holds the traces of this config."""
    result = read_result(config.run_dir)
    if "kept" not in result or not (config.run_dir / TRACES).is_file():
        return False
    if differing(read_config(TracesConfig, config.run_dir / "config.yaml"), config):
        return False
    say(f"already finished: {result['kept']} traces kept; {config.run_dir / TRACES}")
    return True


def sample(config: TracesConfig, stop: StopSignal) -> int:
    if is_finished(config):
        return 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    make_deterministic(config.sample.seed, kernels=True)
    world = World(make_accelerator(config.engine.timeout_s))
    stop.any_process = world.any
    with ExitStack() as stack:
        if world.is_main:
            stack.enter_context(run_lock(config.run_dir))
            claim_config(config, planned=CHOOSING)
        world.wait()
        pool = make_scorer(config)
        stack.callback(pool.close)
        teacher = make_teacher(config, pool, world, stack)
        if world.is_main:
            claim_inputs(config, teacher.found, say)
            for name in ("result.json", TRACES):  # first: beside a new config they would pass for its own
                (config.run_dir / name).unlink(missing_ok=True)
            write_config(config)
        world.wait()
        is_stopped = not record_all(config, teacher, pool=pool, world=world, stop=stop)
        if is_stopped and world.is_main:
            say("stopped; the same command goes on from the records that are there")
        elif world.is_main:
            conclude(config, teacher)
    world.end()
    return stop.exit_code() if is_stopped else 0


def make_teacher(config: TracesConfig, pool: RewardPool, world: World, stack: ExitStack) -> Teacher:
    data, s = config.data, config.sample
    note = say if world.is_main else lambda text: None
    rows = without_asked(config.overlap, load_rows(data), data.prompt_column, note)
    check_rewards(pool, data, rows, note)
    own, names = config.model.model_dump(), [spec.name for spec in config.rewards.functions]
    found = fingerprints("none/none", None, {"data": rows}, rewards=names) | {"versions": library_versions()}
    if s.endpoint or s.completion_column:
        if needy := [asks.name for asks in pool.asks if asks.needs_ids]:
            raise ValueError(f"reward {needy[0]!r} counts tokens, which traces sampled elsewhere lack")
        if s.completion_column:
            return Teacher(*read_traces(data, rows, s.completion_column), found)
        prompts = [unrendered_prompt(data, row, f"sample/{i:06d}") for i, row in enumerate(rows)]
        found["model"] = {"name": config.model.name}
        return Teacher(prompts, lambda call: ask_endpoint(config, call), found)
    model = ModelConfig.model_validate(own | {"name": resolve_model(config.model.name)})
    refuse_masked(model.name, model.revision)
    tokenizer = load_tokenizer(model)
    prompts = make_prompts(data, rows, tokenizer, "sample", template_file=model.chat_template, note=note)
    longest = max(len(p.token_ids) for p in prompts) + config.sampling.max_completion_length
    check_config(model, tokenizer, longest)
    found |= fingerprints(model.name, tokenizer, {"data": rows}, revision=model.revision, rewards=names)
    engine = stack.enter_context(
        open_engine(
            config, model, tokenizer=tokenizer, longest=longest, world=world, note=note, out=config.run_dir
        )
    )
    ends = end_token_ids(tokenizer, (), generation_config(model))
    return Teacher(prompts, engine.generate, found | {"engine": {"name": engine.name}}, ends)


def record_all(
    config: TracesConfig, teacher: Teacher, *, pool: RewardPool, world: World, stop: StopSignal
) -> bool:
    """Samples and grades the missing records, one by one; returns False if a signal came before the last.

    A record does not depend on the number of processes: its own number determines its prompts and seeds. Too
    many faults of graders end the run before the record is written.
    """
    s, prompts, ledger = config.sample, teacher.prompts, Ledger(config.run_dir)
    params, began, sums = sampling_params(config.sampling, teacher.ends), time.monotonic(), [0, 0, 0]
    num_records = -(-len(prompts) // s.prompts_per_record)
    for first in range(0, num_records, world.size):
        if stop.requested():
            return False
        index = first + world.rank
        if index >= num_records or ledger.read(index) is not None:
            continue
        numbers = range(len(prompts))[index * s.prompts_per_record :][: s.prompts_per_record]
        seeds = tuple(sampling_seed(s.seed, n, "sample") for n in numbers)
        call = Call(tuple(prompts[n] for n in numbers), s.num_samples, params, seeds, with_logprobs=False)
        with naming(config.run_dir / ENGINE_LOG):
            groups = pool.score(teacher.generate(call))
        if sentence := check_faults(groups, config.rewards.max_fault_share, list):
            say(sentence)
        ledger.write(index, groups, cursor_before=None, cursor_after=None, policy_version=0)
        completions = [c for group in groups for c in group.completions]
        new = (
            len(completions),
            sum(len(c.token_ids) for c in completions),
            choose(groups, config)[1]["verified"],
        )
        sums = [a + b for a, b in zip(sums, new, strict=True)]
        rates = [number / (time.monotonic() - began) for number in sums]
        say(
            f"record {index + 1} of {num_records}: {rates[0]:.1f} completions/s, {rates[1]:.0f} tokens/s, "
            f"{sums[2] / max(sums[0], 1):.1%} verified"
        )
    world.wait()
    return True


def recorded(config: TracesConfig, num_records: int) -> Iterator[ScoredGroup]:
    """Every group of the ledger, in order; raises RuntimeError if a record is missing."""
    ledger = Ledger(config.run_dir)
    for index in range(num_records):
        if (record := ledger.read(index)) is None:
            raise RuntimeError(f"{config.run_dir}: record {index + 1} went missing; start again to sample it")
        yield from record.groups


def conclude(config: TracesConfig, teacher: Teacher) -> None:
    """Writes the traces and `result.json`; raises ValueError if no trace is kept."""
    num_records = -(-len(teacher.prompts) // config.sample.prompts_per_record)
    traces, counts = choose(recorded(config, num_records), config)
    if not traces:
        raise ValueError(
            f"of {counts['completions']} completions {counts['verified']} are verified by {config.verify} "
            f"(graded: {counts['graded']}), and no verified one is complete; sample more prompts, lower "
            "sample.verify, raise sampling.max_completion_length, or look at them with cohort report "
            f"{config.run_dir}"
        )
    graders = described({spec.name: spec.options for spec in config.rewards.functions})
    origin = {
        "model": None if config.sample.completion_column else config.model.name,
        "endpoint": config.sample.endpoint,
        "revision": config.model.revision,
        "sampler": config.sampling.model_dump(mode="json"),
        "seed": config.sample.seed,
        "graders": graders,
        "data": config.data.source,
        "inputs": teacher.found,
    }
    rows = [row_of(trace, json.dumps(origin, sort_keys=True)) for trace in traces]
    with written_whole(config.run_dir / TRACES) as file:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    result = {**counts, "traces": TRACES}
    write_atomically(config.run_dir / "result.json", json.dumps(result, indent=2) + "\n")
    say(
        f"{counts['kept']} traces of {counts['kept_prompts']} prompts kept, of {counts['verified']} verified "
        f"and {counts['completions']} sampled; {config.run_dir / TRACES}"
    )


def row_of(trace: Trace, origin: str) -> dict[str, Any]:
    """Prompt and completion as TRL takes them: both messages, or both text."""
    prompt, text = trace.prompt, trace.text
    return {
        "prompt": [dict(message) for message in prompt.messages] or prompt.text,
        "completion": [{"role": "assistant", "content": text}] if prompt.messages else text,
        "prompt_id": prompt.id,
        "sample": trace.sample,
        "pass_rate": trace.pass_rate,
        "score": trace.reward.score,
        "parts": json.dumps(dict(trace.reward.parts)),
        "provenance": origin,
    }


if __name__ == "__main__":
    sys.exit(main())
