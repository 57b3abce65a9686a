"""One SFT step of a masked diffusion model: ours against the plain form, same weights, texts and masks.

    python -m tests.bench.llada_sft [--shape smollm2] [--length 1024] [--vocabulary 126464] [--rows 16]

Plain: rows padded to the longest, transformers' forward with a padding mask, logits of every column, cross
entropy of the masked ones (the reference code's loss). Ours: packed rows, log-probs of masked columns in
chunks. Both: one noised copy of every text, AdamW, bf16 autocast over fp32 weights on CUDA, fp32 on a CPU.
Each runs in a process of its own. On a CPU the defaults are small and memory is the resident set.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from rl.config import ModelConfig
from rl.diffusion.elbo import masked_elbo, pack_plan
from rl.diffusion.model import DiffusionScorer, to_diffusion, use_fused_diffusion_layers
from rl.diffusion.objectives import Example, Noised, make_plan, normalisers, step_generator
from tests.bench.clock import synchronize

MASK, FORMS = 3, ("plain", "cohort")
SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "heads": (4, 2)},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "heads": (9, 3)},
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "heads": (32, 8)},
}


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2" if cuda else "tiny")
    parser.add_argument("--length", type=int, default=1024 if cuda else 128, help="longest text, in tokens")
    parser.add_argument("--vocabulary", type=int, default=126464 if cuda else 16384)
    parser.add_argument("--rows", type=int, default=16 if cuda else 8, help="texts in one forward pass")
    parser.add_argument("--steps", type=int, default=5, help="measured, after two")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in both")
    parser.add_argument("--compile", action="store_true", help="ours with model.compile")
    parser.add_argument("--equal", action="store_true", help="all texts at full length: nothing to pack")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.form:
        print(json.dumps(measure(arguments)))
        return
    found = {form: in_child(form) for form in FORMS}
    device = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
    lengths = [len(e.token_ids_T) for e in texts(arguments)]
    print(
        f"{arguments.shape}, vocabulary {arguments.vocabulary:,}; {arguments.rows} texts of {min(lengths)} "
        f"to {max(lengths)} tokens, mean {sum(lengths) / len(lengths):.0f}; {device}"
    )
    print(f"{'':10s}{'s/step':>10s}{'peak GiB':>10s}{'above idle':>12s}{'loss':>10s}")
    for form, r in found.items():
        print(f"{form:10s}{r['seconds']:10.3f}{r['peak']:10.2f}{r['above']:12.2f}{r['loss']:10.4f}")
    plain, ours = (found[form] for form in FORMS)
    ratios = (
        plain["seconds"] / ours["seconds"],
        ours["peak"] / plain["peak"],
        ours["above"] / plain["above"],
    )
    print("speed {:.2f}x, peak memory {:.2f} of it, above weights and optimizer {:.2f} of it".format(*ratios))


def in_child(form: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.llada_sft", *sys.argv[1:], f"--form={form}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{form}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def texts(arguments: argparse.Namespace) -> list[Example]:
    """Lengths evenly from an eighth of the longest to it; the first quarter of a text is its prompt."""
    generator = torch.Generator().manual_seed(0)
    low = arguments.length if arguments.equal else max(arguments.length // 8, 4)
    found = []
    for length in torch.linspace(low, arguments.length, arguments.rows).long().tolist():
        ids = torch.randint(4, arguments.vocabulary, (length,), generator=generator)
        found.append(Example(ids, torch.arange(length) >= length // 4))
    return found


def make_model(arguments: argparse.Namespace) -> LlamaForCausalLM:
    shape: dict[str, Any] = dict(SHAPES[arguments.shape])
    heads, kv_heads = shape.pop("heads")
    config = LlamaConfig(
        **shape,
        vocab_size=arguments.vocabulary,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=arguments.length,
        tie_word_embeddings=True,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    model, examples = make_model(arguments), texts(arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    to_diffusion(model, mask_token_id=MASK)
    scorer = DiffusionScorer(model)
    if arguments.form == "plain":
        model.set_attn_implementation("sdpa")
    elif torch.cuda.is_available():
        use_fused_diffusion_layers(model, ModelConfig(dtype="bf16-mixed", fused_layers=not arguments.compile))
    if arguments.form == "cohort" and arguments.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    idle, seconds, loss = 0.0, [], 0.0
    for step in range(arguments.steps + 2):
        # The same masks at each step of both forms: "count" is one copy of a text, as the reference has.
        plan = make_plan(examples, step_generator(0, step), mask_token_id=MASK, scheme="count")
        synchronize()
        began = time.perf_counter()
        form = plain_loss if arguments.form == "plain" else our_loss
        loss = form(model, scorer, plan, examples, arguments)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize()
        seconds.append(time.perf_counter() - began)
        if step == 0:
            idle = memory()  # weights and moments, as no gradient is left
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
    peak = peak_memory()
    return {
        "seconds": sorted(seconds[2:])[arguments.steps // 2],
        "peak": peak,
        "above": peak - idle,
        "loss": loss,
    }


def our_loss(
    model: LlamaForCausalLM,
    scorer: DiffusionScorer,
    plan: list[Noised],
    examples: list[Example],
    arguments: argparse.Namespace,
) -> float:
    total, weights = 0.0, torch.tensor(normalisers(examples, "sequence"), device=model.device)
    for row in pack_plan(plan, arguments.rows * arguments.length):
        with autocast():
            elbos, _ = masked_elbo(scorer, [row.to(model.device)], len(examples))
        loss = -(elbos * weights).sum()
        loss.backward()
        total += loss.item()
    return total


def plain_loss(
    model: LlamaForCausalLM,
    scorer: DiffusionScorer,
    plan: list[Noised],
    examples: list[Example],
    arguments: argparse.Namespace,
) -> float:
    width = max(len(copy.token_ids_T) for copy in plan)
    ids = torch.full((len(plan), width), 1)
    clean, weights = ids.clone(), torch.zeros(len(plan), width)
    mask = torch.zeros_like(ids)
    per_example = normalisers(examples, "sequence")
    for i, copy in enumerate(plan):
        n = len(copy.token_ids_T)
        ids[i, :n], mask[i, :n], clean[i, :n] = copy.token_ids_T, 1, examples[copy.example].token_ids_T
        weights[i, copy.columns_K] = copy.weights_K * per_example[copy.example]
    ids, mask, clean, weights = (x.to(model.device) for x in (ids, mask, clean, weights))
    masked = weights > 0
    with autocast():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        token_loss = cross_entropy(logits[masked], clean[masked], reduction="none")
    loss = (token_loss * weights[masked]).sum()
    loss.backward()
    return loss.item()


def autocast() -> contextlib.AbstractContextManager[Any]:
    if torch.cuda.is_available():
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def memory() -> float:
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**30
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**30


def peak_memory() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


if __name__ == "__main__":
    main()
