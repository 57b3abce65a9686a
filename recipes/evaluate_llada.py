"""Evaluation of masked diffusion models: `python -m recipes.evaluate_llada MODEL --perplexity FILE ...`.

Perplexity and multiple choice by Algorithm 3 of LLaDA (arXiv:2502.09992), generation by the sampler, and the
tasks of lm-eval by both. The model: a LLaDA or Dream, what recipes.llada saved, or a causal one, converted.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from recipes.models import resolve_model
from recipes.tasks import load_rows
from rewards.math import grade
from rl.command import run_command
from rl.config import DataConfig
from rl.diffusion.config import DiffusionModelConfig, EosConfig, TextConfig
from rl.diffusion.harness import harness_model
from rl.diffusion.likelihood import bound, choose, log_likelihoods
from rl.diffusion.model import is_shifted
from rl.diffusion.objectives import Example, step_generator
from rl.diffusion.policy import DiffusionPolicy
from rl.diffusion.text import encode_rows, padded_examples
from rl.rundir import Evaluation
from rl.shared_prompt import run_attention
from rl.types import Completion, Prompt, SamplingParams
from rl.world import make_accelerator
from rollout.chat import end_token_ids, render_prompts
from rollout.diffusion_engine import DiffusionEngine
from rollout.diffusion_steps import DenoisingParams
from rollout.sampler import completion_seed

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what was asked for. The exit code: 0 done, 1 a fault the user can mend, as one sentence."""
    a = arguments(argv)
    return run_command(lambda: run(a))


def run(a: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    policy = load(a)
    has_template = bool(policy.tokenizer.chat_template)
    a.chat = has_template if a.chat is None else a.chat
    if a.chat and not has_template:
        raise ValueError(f"--chat: the tokenizer of {a.model} has no chat template; leave --chat out")
    print(f"{a.model}: prompts are {'chats' if a.chat else 'plain text'}, seed {a.seed}")
    if a.perplexity:
        perplexity(policy, a)
    if a.choices:
        multiple_choice(policy, a)
    if a.generate:
        generation(policy, a)
    if a.lm_eval:
        lm_eval_tasks(policy, a)
    return 0


def load(a: argparse.Namespace) -> DiffusionPolicy:
    """The model as recipes.llada loads it; the adapter that it saved is merged into its base model.

    Raises:
        ValueError: started in several processes; no model there.
    """
    accelerator = make_accelerator()
    if accelerator.num_processes > 1:
        raise ValueError("recipes.evaluate_llada is one process; start it with python -m")
    name = resolve_model(a.model)
    adapter = Path(name) / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else name
    dtype = a.dtype or ("bf16" if accelerator.device.type == "cuda" else "fp32")
    token = int(a.mask_token) if a.mask_token and a.mask_token.isdecimal() else a.mask_token
    policy = DiffusionPolicy(
        DiffusionModelConfig(name=base, dtype=dtype, mask_token=token), accelerator, name=base
    )
    if adapter.exists():
        from peft import PeftModel

        PeftModel.from_pretrained(policy.model, name).merge_and_unload()
    return policy


def perplexity(policy: DiffusionPolicy, a: argparse.Namespace) -> None:
    """The bound on texts, or on completions given their prompts, as recipes.llada has it of held-out text."""
    rows = read(a.perplexity, a.limit)
    room = policy.context_length or sys.maxsize
    size = min(a.max_length, room) if "text" in rows[0] else sys.maxsize  # long rows are refused by `bound`
    config = TextConfig(source=str(a.perplexity), chat=a.chat, max_length=size)
    mask, shift = policy.mask_token_id, is_shifted(policy.model)
    encoded, _ = encode_rows(rows, config, policy.tokenizer, mask_token_id=mask, shift=shift)
    found = bound(
        policy.scorer,
        padded_examples(encoded, EosConfig(policy="single"), []),
        step_generator(a.seed),
        mask_token_id=mask,
        num_draws=a.num_draws or 4,
        token_budget=a.token_budget,
    )
    print(f"perplexity of {a.perplexity}: {found}")
    if found.num_examples == 1:
        print("a single example has no standard error; for several pieces of a text lower --max-length")


def multiple_choice(policy: DiffusionPolicy, a: argparse.Namespace) -> None:
    """Accuracy: the choice with the greatest log-likelihood, whole and per character (lm-eval's acc_norm)."""
    rows = read(a.choices, a.limit)
    for index, row in enumerate(rows):
        choices, answer = row.get("choices"), row.get("answer")
        if not choices or not all(isinstance(c, str) and c for c in choices):
            raise ValueError(f"{a.choices} row {index}: 'choices' must be a list of texts that are not empty")
        if type(answer) is not int or not 0 <= answer < len(choices):
            raise ValueError(
                f"{a.choices} row {index}: 'answer' is {answer!r}; give the index of the right choice, "
                f"0 to {len(choices) - 1}"
            )
    prompts = rendered(rows, policy, a, a.choices)
    examples = []
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        for choice in row["choices"]:
            ids = policy.tokenizer(choice, add_special_tokens=False)["input_ids"]
            fits(policy, a.choices, index, [*prompt.token_ids, *ids], 0)
            maskable = torch.arange(len(prompt.token_ids) + len(ids)) >= len(prompt.token_ids)
            examples.append(Example(torch.tensor([*prompt.token_ids, *ids]), maskable))
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


def generation(policy: DiffusionPolicy, a: argparse.Namespace) -> None:
    """Samples, a few of them shown, and the share that the math grader finds right."""
    rows = read(a.generate, a.limit)
    prompts = rendered(rows, policy, a, a.generate)
    for index, prompt in enumerate(prompts):
        fits(policy, a.generate, index, list(prompt.token_ids), a.gen_length)
    texts = [c.text for c in sample(engine_of(policy, a), prompts, a.temperature, a)]
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


def lm_eval_tasks(policy: DiffusionPolicy, a: argparse.Namespace) -> None:
    """lm-eval's own table of its tasks."""
    model = harness_model(
        policy.scorer,
        policy.tokenizer,
        mask_token_id=policy.mask_token_id,
        generate=partial(generate, engine_of(policy, a), a),
        gen_length=a.gen_length,
        num_draws=a.num_draws or 128,
        seed=a.seed,
        token_budget=a.token_budget,
    )
    try:
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
        from lm_eval.utils import make_table  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"lm-eval is not whole ({error}); pip install lm-eval==0.4.13 mends it") from None

    manager = TaskManager(include_path=str(a.lm_eval_path) if a.lm_eval_path else None)
    names = a.lm_eval.split(",")
    for name in names:
        if name not in manager.all_tasks:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks)) or "none"
            raise ValueError(
                f"--lm-eval: there is no task {name!r}; near names: {near}. Tasks of your own are found with "
                "--lm-eval-path"
            )
    results = simple_evaluate(
        model=model,
        tasks=names,
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


def generate(
    engine: DiffusionEngine,
    a: argparse.Namespace,
    prompts: Sequence[list[int]],
    settings: dict[str, Any],
) -> list[str]:
    """Texts for lm-eval. The canvas is the command line's; a task's `max_gen_toks` cuts what is in it, and
    its temperature counts where it samples (`do_sample`).
    """
    temperature = settings.get("temperature", a.temperature) if settings.get("do_sample") else a.temperature
    asked = [Prompt(f"lm-eval/{i:06d}", "", tuple(ids)) for i, ids in enumerate(prompts)]
    ids = [c.token_ids[: settings.get("max_gen_toks")] for c in sample(engine, asked, temperature, a)]
    return engine.tokenizer.batch_decode(ids, skip_special_tokens=True)


def engine_of(policy: DiffusionPolicy, a: argparse.Namespace) -> DiffusionEngine:
    settings = DenoisingParams(gen_length=a.gen_length, block_length=a.block_length, steps=a.steps)
    return DiffusionEngine(
        policy.model, policy.tokenizer, settings, timeout_s=float("inf"), attend=run_attention
    )


def sample(
    engine: DiffusionEngine, prompts: Sequence[Prompt], temperature: float, a: argparse.Namespace
) -> list[Completion]:
    """A completion per prompt; that of prompt i depends on --seed and i alone."""
    ends = end_token_ids(engine.tokenizer, generation_config=engine.model.generation_config)
    sampling = SamplingParams(a.gen_length, temperature=temperature, stop_token_ids=ends)
    seeds = [completion_seed(a.seed, i) for i in range(len(prompts))]
    groups = engine.generate(prompts, num_completions=1, sampling=sampling, seeds=seeds, with_logprobs=False)
    found = [group.completions[0] for group in groups]
    if broken := [p.id for p, c in zip(prompts, found, strict=True) if c.finish_reason == "abort"]:
        raise ValueError(
            f"{len(broken)} of {len(prompts)} prompts, the first {broken[0]}, got no completion: they are "
            "empty, contain the mask token, or the model's logits are not finite; leave them out"
        )
    return found


def read(path: Path, limit: int | None) -> list[Row]:
    if not path.is_file():
        raise ValueError(f"{path} is no file; give one of JSON lines (--help says with which columns)")
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


def fits(policy: DiffusionPolicy, path: Path, index: int, ids: Sequence[int], gen_length: int) -> None:
    """Refuses a row that the model has no positions for, or that contains the mask token."""
    room = policy.context_length
    if room is not None and len(ids) + gen_length > room:
        beside = f" and --gen-length {gen_length} more" if gen_length else ""
        lower = " or lower --gen-length" if gen_length else ""
        raise ValueError(
            f"{path} row {index} has {len(ids)} tokens{beside}, and the model has {room} positions; shorten "
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
    return str(Evaluation.of(0, right, total))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.evaluate_llada", description=(__doc__ or "").partition("\n\n")[2]
    )
    add = parser.add_argument
    add("model", help="folder, hub name or built-in name")
    add("--perplexity", type=Path, metavar="FILE", help='rows {"text"} or {"prompt", "completion"}')
    add("--choices", type=Path, metavar="FILE", help='rows {"prompt", "choices": [...], "answer": index}')
    add("--generate", type=Path, metavar="FILE", help='rows {"prompt"}, or {"prompt", "answer"} to grade')
    add("--lm-eval", metavar="TASK,TASK", help="tasks of lm-eval (pip install lm-eval==0.4.13)")
    add("--lm-eval-path", type=Path, metavar="FOLDER", help="YAML files of tasks of your own")
    add("--chat", action=argparse.BooleanOptionalAction, help="default: if there is a chat template")
    add("--limit", type=positive, metavar="N", help="the first rows of every file and task")
    add("--seed", type=int, default=0)
    add("--num-draws", type=positive, help="masks per example; default: 128, and 4 for --perplexity")
    add("--max-length", type=positive, default=1024, help="tokens of a piece of text for --perplexity")
    add("--token-budget", type=positive, default=8192, help="packed tokens of one forward pass")
    add("--gen-length", type=positive, default=128, help="tokens of a completion at most")
    add("--block-length", type=positive, default=32)
    add("--steps", type=positive, help="model calls per completion; default: one per token")
    add("--temperature", type=float, default=0.0)
    add("--show", type=int, default=3, metavar="N", help="completions that are printed")
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU")
    add("--mask-token", help="token or id; default: the checkpoint's own, else a spare vocabulary row")
    a = parser.parse_args(argv)
    if not (a.perplexity or a.choices or a.generate or a.lm_eval):
        parser.error("nothing to do; give --perplexity, --choices, --generate or --lm-eval")
    return a


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


if __name__ == "__main__":
    sys.exit(main())
