"""Evaluation of masked diffusion models: `python -m recipes.evaluate_llada MODEL --perplexity FILE ...`.

It measures perplexity and multiple choice by Algorithm 3 of LLaDA (arXiv:2502.09992), generation by sampling,
and lm-eval's tasks by both. The model is a LLaDA, a Dream, from recipes.llada, or a causal one, converted.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from recipes.cli.command import run_command
from recipes.evaluate_options import arguments, denoising_params, in_options
from recipes.models import resolve_model
from recipes.tasks import load_rows
from rewards.math.grader import grade
from rl.config import DataConfig
from rl.config.diffusion import DiffusionModelConfig, EosConfig, TextConfig
from rl.diffusion.harness import harness_model
from rl.diffusion.likelihood import bound, choose, log_likelihoods
from rl.diffusion.model import is_shifted
from rl.diffusion.objectives import Example, step_generator
from rl.diffusion.policy import DiffusionPolicy
from rl.diffusion.saved_config import model_config, raw_config
from rl.diffusion.text import encode_rows, padded_examples
from rl.store.folder import Evaluation
from rl.store.metrics import wilson_interval
from rl.types import Call, Completion, Prompt, SamplingParams
from rl.world import make_accelerator
from rollout.chat import end_token_ids, render_prompts
from rollout.diffusion.engine import DiffusionEngine
from rollout.sampler import completion_seed

Row = dict[str, Any]
Measure = Callable[[], None]
"""Computes and prints a result. What could be refused was refused before this function was made."""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what was asked for. The exit code is 0, or 1 after a fault, which is one sentence on stderr."""
    a = arguments(argv, (__doc__ or "").partition("\n\n")[2])
    return run_command(lambda: run(a), in_words=in_options)


def run(a: argparse.Namespace) -> int:
    """Checks options, config.json and files before weights are read, and all rows before any is computed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = denoising_params(a)
    raw_config(resolve_model(a.model), None)
    prepare = {"perplexity": perplexity, "choices": multiple_choice, "generate": generation}
    files = {name: read(path, a.limit) for name in prepare if (path := getattr(a, name)) is not None}
    if "choices" in files:
        check_choices(files["choices"], a.choices)
    manager = task_manager(a) if a.lm_eval else None
    policy = load(a)
    has_template = bool(policy.tokenizer.chat_template)
    a.chat = has_template if a.chat is None else a.chat
    if a.chat and not has_template:
        raise ValueError(f"--chat: the tokenizer of {a.model} has no chat template; leave --chat out")
    print(f"{a.model}: prompts are {'chats' if a.chat else 'plain text'}, seed {a.seed}")
    engine = DiffusionEngine(policy.model, policy.tokenizer, settings, timeout_s=float("inf"))
    measures = [prepare[name](policy, engine, rows, a) for name, rows in files.items()]
    if manager is not None:
        measures.append(lm_eval_tasks(policy, engine, manager, a))
    for measure in measures:
        measure()
    return 0


def load(a: argparse.Namespace) -> DiffusionPolicy:
    """The model as recipes.llada loads it; the command line overrides what the checkpoint says.

    Raises:
        ValueError: it runs in several processes, or there is no model.
    """
    accelerator = make_accelerator()
    if accelerator.num_processes > 1:
        raise ValueError("recipes.evaluate_llada is one process; start it with python -m")
    name = resolve_model(a.model)
    dtype = a.dtype or ("bf16" if accelerator.device.type == "cuda" else "fp32")
    token = int(a.mask_token) if a.mask_token and a.mask_token.isdecimal() else a.mask_token
    config = DiffusionModelConfig(name=name, dtype=dtype, mask_token=token, shift=a.shift)
    policy = DiffusionPolicy(config, accelerator, name=name)
    said = model_config(name, None)
    mask, shift = (getattr(said, key, None) for key in ("mask_token_id", "diffusion_shift"))
    if mask is not None and mask != policy.mask_token_id:
        print(
            f"--mask-token {a.mask_token}: the checkpoint says mask token {mask}, and the option counts "
            f"({policy.mask_token_id})"
        )
    if shift is not None and shift != is_shifted(policy.model):
        flag, theirs = ("--shift", "no shift") if a.shift else ("--no-shift", "shift")
        print(f"{flag}: the checkpoint says {theirs}, and the option counts")
    return policy


def perplexity(
    policy: DiffusionPolicy, engine: DiffusionEngine, rows: Sequence[Row], a: argparse.Namespace
) -> Measure:
    """The bound on texts, or on completions given prompts, as recipes.llada computes it on held-out text."""
    room = policy.context_length or sys.maxsize
    size = min(a.max_length, room) if "text" in rows[0] else sys.maxsize  # long rows are refused by `bound`
    config = TextConfig(source=str(a.perplexity), chat=a.chat, max_length=size)
    mask, shift = policy.mask_token_id, is_shifted(policy.model)
    encoded, _ = encode_rows(rows, config, policy.tokenizer, mask_token_id=mask, shift=shift)
    examples = padded_examples(encoded, EosConfig(policy="single"), [])

    def measure() -> None:
        found = bound(
            policy.scorer,
            examples,
            step_generator(a.seed),
            mask_token_id=mask,
            num_draws=a.num_draws or 4,
            token_budget=a.token_budget,
        )
        print(f"perplexity of {a.perplexity}: {found}")
        if found.num_examples == 1:
            print("a single example has no standard error; for several pieces of a text lower --max-length")

    return measure


def check_choices(rows: Sequence[Row], path: Path) -> None:
    """Raises ValueError for a row without choices, or whose answer is not one of them."""
    for index, row in enumerate(rows):
        choices, answer = row.get("choices"), row.get("answer")
        if not isinstance(choices, list) or not choices or not all(isinstance(c, str) and c for c in choices):
            raise ValueError(f"{path} row {index}: 'choices' must be a list of texts that are not empty")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise ValueError(
                f"{path} row {index}: 'answer' is {answer!r}; give the index of the right choice, "
                f"0 to {len(choices) - 1}"
            )


def multiple_choice(
    policy: DiffusionPolicy, engine: DiffusionEngine, rows: Sequence[Row], a: argparse.Namespace
) -> Measure:
    """Accuracy of the choice of greatest log-likelihood, whole or per character (lm-eval's acc_norm)."""
    prompts = rendered(rows, policy, a, a.choices)
    examples = []
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        for choice in row["choices"]:
            ids = policy.tokenizer(choice, add_special_tokens=False)["input_ids"]
            fits(policy, a.choices, index=index, ids=[*prompt.token_ids, *ids], gen_length=0)
            maskable = torch.arange(len(prompt.token_ids) + len(ids)) >= len(prompt.token_ids)
            examples.append(Example(torch.tensor([*prompt.token_ids, *ids]), maskable))

    def measure() -> None:
        found = log_likelihoods(
            policy.scorer,
            examples,
            mask_token_id=policy.mask_token_id,
            num_draws=a.num_draws or 128,
            seed=a.seed,
            token_budget=a.token_budget,
        ).tolist()
        right = per_character = 0
        for row in rows:
            values, found = found[: len(row["choices"])], found[len(row["choices"]) :]
            right += choose(values) == row["answer"]
            per_character += choose(values, list(map(len, row["choices"]))) == row["answer"]
        print(f"choices of {a.choices}: {share(right, len(rows))}")
        print(f"choices of {a.choices}, per character: {share(per_character, len(rows))}")

    return measure


def generation(
    policy: DiffusionPolicy, engine: DiffusionEngine, rows: Sequence[Row], a: argparse.Namespace
) -> Measure:
    """Samples completions, prints a few, and prints the share that the math grader finds right."""
    prompts = rendered(rows, policy, a, a.generate)
    for index, prompt in enumerate(prompts):
        fits(policy, a.generate, index=index, ids=list(prompt.token_ids), gen_length=a.gen_length)

    def measure() -> None:
        texts = [c.text for c in sample(engine, prompts, a.temperature, a)]
        for prompt, text in list(zip(prompts, texts, strict=True))[: a.show]:
            print(f"\n{prompt.text}{text}")
        answered = [
            (t, str(r["answer"])) for t, r in zip(texts, rows, strict=True) if r.get("answer") is not None
        ]
        scores = [grade(text, answer).score for text, answer in answered]
        graded = [score for score in scores if score is not None]
        unclear = f"; {len(scores) - len(graded)} cannot be graded" if len(graded) < len(scores) else ""
        if scores:
            print(f"generation of {a.generate}: {share(int(sum(graded)), len(graded))}{unclear}")

    return measure


def task_manager(a: argparse.Namespace) -> Any:
    """lm-eval's `TaskManager`, which finds tasks by name.

    Raises:
        ValueError: lm-eval cannot be imported, or has no such task.
    """
    if a.lm_eval_path is not None and not a.lm_eval_path.is_dir():
        raise ValueError(f"--lm-eval-path {a.lm_eval_path} is not a folder; give one with YAML task files")
    try:
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"--lm-eval: lm-eval cannot be imported ({error}); pip install lm-eval==0.4.13 brings it and "
            "what it needs"
        ) from None
    manager = TaskManager(include_path=str(a.lm_eval_path) if a.lm_eval_path else None)
    for name in a.lm_eval.split(","):
        if name not in manager.all_tasks:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks)) or "none"
            raise ValueError(
                f"--lm-eval: there is no task {name!r}; near names: {near}. Tasks of your own are found with "
                "--lm-eval-path"
            )
    return manager


def lm_eval_tasks(
    policy: DiffusionPolicy, engine: DiffusionEngine, manager: Any, a: argparse.Namespace
) -> Measure:
    """Prints lm-eval's own table of its tasks."""
    model = harness_model(
        policy.scorer,
        policy.tokenizer,
        mask_token_id=policy.mask_token_id,
        generate=partial(generate, engine, a),
        gen_length=a.gen_length,
        num_draws=a.num_draws or 128,
        seed=a.seed,
        token_budget=a.token_budget,
    )

    def measure() -> None:
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.utils import make_table  # pyright: ignore[reportMissingImports]

        results = simple_evaluate(
            model=model,
            tasks=a.lm_eval.split(","),
            task_manager=manager,
            limit=a.limit,
            apply_chat_template=a.chat,
            random_seed=a.seed,
            numpy_random_seed=a.seed,
            torch_random_seed=a.seed,
            fewshot_random_seed=a.seed,
            log_samples=False,
        )
        print(make_table(results))

    return measure


def generate(
    engine: DiffusionEngine,
    a: argparse.Namespace,
    prompts: Sequence[list[int]],
    settings: dict[str, Any],
) -> list[str]:
    """Texts for lm-eval. The command line sets the canvas; a task's `max_gen_toks` cuts the text, and its
    temperature counts if it samples (`do_sample`).
    """
    temperature = settings.get("temperature", a.temperature) if settings.get("do_sample") else a.temperature
    asked = [Prompt(f"lm-eval/{i:06d}", "", tuple(ids)) for i, ids in enumerate(prompts)]
    ids = [c.token_ids[: settings.get("max_gen_toks")] for c in sample(engine, asked, temperature, a)]
    return engine.tokenizer.batch_decode(ids, skip_special_tokens=True)


def sample(
    engine: DiffusionEngine, prompts: Sequence[Prompt], temperature: float, a: argparse.Namespace
) -> list[Completion]:
    """A completion per prompt; that of prompt i depends only on --seed and i. ValueError if one failed."""
    ends = end_token_ids(engine.tokenizer, generation_config=engine.model.generation_config)
    sampling = SamplingParams(a.gen_length, temperature=temperature, stop_token_ids=ends)
    seeds = tuple(completion_seed(a.seed, i) for i in range(len(prompts)))
    groups = engine.generate(Call(tuple(prompts), 1, sampling, seeds, with_logprobs=False))
    found = [group.completions[0] for group in groups]
    if broken := [p.id for p, c in zip(prompts, found, strict=True) if c.finish_reason == "abort"]:
        raise ValueError(
            f"{len(broken)} of {len(prompts)} prompts, the first {broken[0]}, got no completion: they are "
            "empty, contain the mask token, or the model's logits are not finite; leave them out"
        )
    return found


def read(path: Path, limit: int | None) -> list[Row]:
    if not path.is_file():
        raise ValueError(f"{path} is not a file; give one of JSON lines (--help says with which columns)")
    return load_rows(DataConfig(source=str(path), size=limit))


def rendered(rows: Sequence[Row], policy: DiffusionPolicy, a: argparse.Namespace, path: Path) -> list[Prompt]:
    """Prompts as training and sampling see them."""
    return render_prompts(
        rows,
        policy.tokenizer,
        prefix=str(path),
        prompt_column="prompt",
        chat=a.chat,
        max_prompt_length=sys.maxsize,
    )


def fits(policy: DiffusionPolicy, path: Path, *, index: int, ids: Sequence[int], gen_length: int) -> None:
    """Refuses a row that the model has no positions for, or that contains the mask token."""
    room = policy.context_length
    if room is not None and len(ids) + gen_length > room:
        beside = f" and --gen-length {gen_length} more" if gen_length else ""
        lower = " or lower --gen-length" if gen_length else ""
        raise ValueError(
            f"{path} row {index} has {len(ids)} tokens{beside}, but the model has {room} positions; shorten "
            f"the row, leave it out{lower}"
        )
    if policy.mask_token_id in ids:
        raise ValueError(
            f"{path} row {index} contains the mask token (id {policy.mask_token_id}); leave the row out, or "
            "name the model's own mask token with --mask-token"
        )


def share(right: int, total: int) -> str:
    if not total:
        return "none can be graded"
    return str(Evaluation(0, right / total, *wilson_interval(right, total), total))


if __name__ == "__main__":
    sys.exit(main())
