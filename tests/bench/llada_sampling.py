"""The diffusion sampler against the plain loop of the LLaDA paper: same model, prompts and settings, one run.

    python -m tests.bench.llada_sampling [--shape tiny|smollm2|llada] [--model FOLDER --questions rows.jsonl]

The plain loop is a transcription of the published algorithm: prompts padded to a rectangle, the whole row's
logits at every step, confidences of all of them in float64, all steps of all blocks. Prompts are ragged
(uniform from a quarter to the whole of --prompt-length). "exact" lines make no approximation; the lines below
do, and `same` is the share of completion tokens that agree with the exact ones. A random model is as unsure
as can be, so for thresholds, caches and early ends give a trained one; with --questions (prompt and answer
per line) completions are graded too.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rewards.math.grader import grade
from rl.config import ModelConfig
from rl.diffusion.model import load_diffusion_model, use_fused_diffusion_layers
from rl.model.varlen import run_attention
from rollout.diffusion.denoise import Denoised, denoise, prompt_canvas
from rollout.diffusion.graph import GraphedDenoiser
from rollout.diffusion.model import Denoiser, TransformersDenoiser
from rollout.diffusion.steps import DenoisingParams
from tests.bench.clock import synchronize
from tests.diffusion.plain_sampler import plain_generate

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 8192, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2},
    "smollm2": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "llada": {"vocab_size": 126464, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32},
}  # fmt: skip


def main() -> None:
    a = arguments()
    torch.set_num_threads(a.threads)
    model, tokenizer = load(a)
    denoiser = TransformersDenoiser(model, None if a.model else SHAPES[a.shape]["vocab_size"] - 1)
    prompts, answers = questions(a, denoiser, tokenizer)
    lengths = sorted(map(len, prompts))
    print(
        f"{a.model or a.shape} on {device_name(a.device)}, {a.dtype}: {len(prompts)} prompts of "
        f"{lengths[0]} to {lengths[-1]} tokens, {a.gen_length} tokens in blocks of {a.block_length}, "
        f"{a.steps} steps, temperature {a.temperature:g}"
    )
    settings = {
        "gen_length": a.gen_length,
        "block_length": a.block_length,
        "steps": a.steps,
        "temperature": a.temperature,
    }
    table = Table(a, prompts, answers, tokenizer)
    model.set_attn_implementation("sdpa")  # follows the plain loop's 4-D mask; the sampler brings its own
    for dtype in (torch.float64, model.dtype):
        run = lambda dtype=dtype: plain_generate(  # noqa: E731
            model, prompts, mask_id=denoiser.mask_token_id, confidence_dtype=dtype, **settings,
            generator=torch.Generator(a.device).manual_seed(0),
        )  # fmt: skip
        label = str(dtype).removeprefix("torch.")
        table.plain(f"plain loop, {label} confidences", run)
    exact = DenoisingParams(**settings)
    if a.device == "cuda":  # after the plain loop, as in a run: Liger replaces functions of transformers
        compute = "bf16" if model.dtype == torch.bfloat16 else "fp32"
        use_fused_diffusion_layers(model, ModelConfig(dtype=compute))
        denoiser.attend = run_attention
    samples = table.ours("exact", denoiser, exact)[: a.show if a.model else 0]
    graphed: Denoiser = denoiser
    if a.device == "cuda":
        graphed = GraphedDenoiser(denoiser)
        table.ours("exact, CUDA graphs", graphed, exact)
        if graphed.reason:
            print(f"  {graphed.reason}")
    if a.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
        graphed = GraphedDenoiser(denoiser) if a.device == "cuda" else denoiser
        table.ours("exact, compiled layers" + (" and graphs" * (a.device == "cuda")), graphed, exact)
    if stops := a.stop_token_ids or end_ids(tokenizer):
        settings["stop_token_ids"] = tuple(stops)
        table.ours("exact, ended rows leave", graphed, DenoisingParams(**settings))
    for label, extra in (
        ("threshold 0.9", {"threshold": 0.9}),
        ("prefix cache", {"cache": "prefix"}),
        ("dual cache", {"cache": "dual"}),
        ("dual cache, refreshed every 8", {"cache": "dual", "refresh_every": 8}),
        ("dual cache, threshold 0.9", {"cache": "dual", "threshold": 0.9}),
    ):
        table.ours(label, graphed, DenoisingParams(**settings, **extra))
    for prompt, text in zip(prompts, samples, strict=False):
        print(f"\n{tokenizer.decode(prompt)}{cut_text(tokenizer, text)}")


class Table:
    """A line per way of sampling: seconds, tokens per second, ratio to the faster plain loop, agreement."""

    def __init__(
        self, a: argparse.Namespace, prompts: list[list[int]], answers: list[str], tokenizer: Any
    ) -> None:
        self.a, self.prompts, self.answers, self.tokenizer = a, prompts, answers, tokenizer
        self.base: float | None = None
        self.reference: list[list[int]] = []
        names = ("seconds", "tokens/s", "ratio", "calls", "same", "right", "peak GiB")
        print(" " * 38, *(f"{name:>8}" for name in names))

    def plain(self, label: str, run: Callable[[], torch.Tensor]) -> None:
        seconds, found = self._timed(run)
        self.base = min(self.base or seconds, seconds)
        texts = found.tolist()
        self.reference = self.reference or texts
        self._line(label, seconds, texts, float(self.a.steps))

    def ours(self, label: str, denoiser: Denoiser, params: DenoisingParams) -> list[list[int]]:
        canvases = [prompt_canvas(p, params, denoiser.mask_token_id) for p in self.prompts]
        run = lambda: denoise(denoiser, canvases, params, seeds=range(len(canvases)))  # noqa: E731
        seconds, rows = self._timed(run)
        done: list[Denoised] = [row for row in rows if row is not None]
        texts = [row.token_ids[len(p) : row.end] for p, row in zip(self.prompts, done, strict=True)]
        if label == "exact" and self.a.temperature:
            self.reference = texts  # other random numbers than the plain loop's
        self._line(label, seconds, texts, sum(row.num_steps for row in done) / len(done))
        return texts

    def _timed(self, run: Callable[[], Any]) -> tuple[float, Any]:
        """The best of --repeats runs after one that warms up."""
        seconds = []
        for _ in range(self.a.repeats + 1):
            synchronize()
            began = time.perf_counter()
            found = run()
            synchronize()
            seconds.append(time.perf_counter() - began)
        return min(seconds[1:]), found

    def _line(self, label: str, seconds: float, texts: list[list[int]], calls: float) -> None:
        tokens = sum(map(len, texts))
        pairs = zip(texts, self.reference, strict=True)
        same = [x == y for ours, theirs in pairs for x, y in zip(ours, theirs, strict=False)]
        right = f"{self._accuracy(texts):.1%}" if self.answers else ""
        peak = ""
        if self.a.device == "cuda":
            peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
            torch.cuda.reset_peak_memory_stats()
        # Rows that end early have fewer tokens and are no slower for it: the ratio compares whole batches.
        ratio = "" if label.startswith("plain") or not self.base else f"{self.base / seconds:.2f}x"
        numbers = (f"{seconds:.3f}", f"{tokens / seconds:.0f}", ratio, f"{calls:.0f}")
        print(f"{label:38}", *(f"{x:>8}" for x in (*numbers, f"{sum(same) / len(same):.1%}", right, peak)))

    def _accuracy(self, texts: list[list[int]]) -> float:
        decoded = [cut_text(self.tokenizer, ids) for ids in texts]
        scores = [
            grade(text, answer).score or 0.0 for text, answer in zip(decoded, self.answers, strict=True)
        ]
        return sum(scores) / len(scores)


def cut_text(tokenizer: Any, ids: list[int]) -> str:
    ends = [i for i, token in enumerate(ids) if token in end_ids(tokenizer)]
    return tokenizer.decode(ids[: ends[0]] if ends else ids, skip_special_tokens=True)


def end_ids(tokenizer: Any) -> list[int]:
    return [] if tokenizer is None else [tokenizer.eos_token_id]


def load(a: argparse.Namespace) -> tuple[Any, Any]:
    dtype = getattr(torch, a.dtype)
    if a.model:
        model = load_diffusion_model(str(a.model), dtype=dtype, mask_token_id=a.mask_token_id)
        return model.to(a.device).eval(), AutoTokenizer.from_pretrained(a.model)
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[a.shape], max_position_embeddings=4096, initializer_range=0.05)
    torch.set_default_dtype(dtype)
    with torch.device(a.device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model, None


def questions(a: argparse.Namespace, denoiser: Denoiser, tokenizer: Any) -> tuple[list[list[int]], list[str]]:
    if a.questions:
        rows = [json.loads(line) for line in a.questions.read_text().splitlines()][: a.rows]
        asked = [row["prompt"] for row in rows]
        chats = [p if isinstance(p, list) else [{"role": "user", "content": p}] for p in asked]
        texts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return ids, [str(row["answer"]) for row in rows]
    draw = random.Random(0)
    lengths = [draw.randint(max(1, a.prompt_length // 4), a.prompt_length) for _ in range(a.rows)]
    return [[draw.randrange(3, denoiser.mask_token_id) for _ in range(n)] for n in lengths], []


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"a CPU, {torch.get_num_threads()} threads"


def arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a diffusion model's folder; default: random weights")
    parser.add_argument("--mask-token-id", type=int, help="where the model's config names none")
    parser.add_argument("--questions", type=Path, help="JSON lines with prompt (text or messages), answer")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2" if cuda else "tiny")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt-length", type=int, default=192 if cuda else 48)
    parser.add_argument("--gen-length", type=int, default=256 if cuda else 32)
    parser.add_argument("--block-length", type=int, default=32 if cuda else 16)
    parser.add_argument("--steps", type=int, help="default: one per token")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--stop-token-ids", type=int, nargs="*", default=[])
    parser.add_argument("--compile", action="store_true", help="also with torch.compile on every layer")
    parser.add_argument("--show", type=int, default=0, help="exact completions printed, with --model")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    a.steps = a.steps or a.gen_length
    return a


if __name__ == "__main__":
    main()
