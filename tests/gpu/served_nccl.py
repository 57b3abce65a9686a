"""On two GPUs: weights go from a trainer (GPU 0) to a server (GPU 1) as files, as deltas, and by NCCL.

    python -m tests.gpu.served_nccl --model MODEL --out OUT [--config FOLDER_WITH_8B_CONFIG | --big]

It prints a line for each sync: bytes, seconds by part, and the canary's gap. Every sync is proved, or it ends
with an error. Without two GPUs it runs on the CPU, by gloo, with a server in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from rollout.vllm.broadcast import WeightBroadcast
from rollout.vllm.engine import VllmEngine
from rollout.vllm.fleet import Fleet
from rollout.vllm.lock import read_token
from rollout.vllm.member import connect
from rollout.vllm.weight_files import WeightFiles
from rollout.weight_sync import publish
from tests.bench.server import serving
from tests.vllm_servers import free_port

ON_GPUS = torch.cuda.device_count() > 1
DTYPE = torch.bfloat16 if ON_GPUS else torch.float32
MAX_LEN, GIB, LR = 512, 2**30, 1e-6
REWARD = '''
def vowels(prompts, completions, **columns):
    """Share of vowels, which differs between completions."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in texts]
'''


def serving_on(model: Path, out: Path, *options: str) -> AbstractContextManager[list[str]]:
    """A server on GPU 1, or on the CPU."""
    words = ["--max-model-len", str(MAX_LEN), "--dtype", str(DTYPE).removeprefix("torch.")]
    words += ["--enforce-eager", *options, *(("--gpu-memory-utilization", "0.5") if ON_GPUS else ())]
    log, devices = out / f"server-{model.name}.log", [1] if ON_GPUS else []
    return serving(model, log, out / "token", *words, devices=devices)


def train(model: Path, out: Path, url: str, name: str, engine: dict[str, Any]) -> None:
    """Three steps of GRPO on GPU 0; prints what `metrics.jsonl` says about each sync."""
    config = {
        "run_dir": str(out / name),
        "model": {"name": str(model), "dtype": "bf16-mixed" if ON_GPUS else "fp32"},
        "data": {"source": str(out / "rows.jsonl"), "max_prompt_length": 128},
        "sampling": {"max_completion_length": 64},
        "engine": {"name": "server", "urls": [url], "token_file": str(out / "token")} | engine,
        "rewards": {"functions": [{"name": "reward_of_vowels:vowels"}]},
        "train": {"steps": 3, "prompts_per_step": 8, "group_size": 4},
        "optimizer": {"lr": LR},
    }
    file = out / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    paths = os.pathsep.join([str(Path.cwd()), str(out), os.environ.get("PYTHONPATH", "")])
    seen = {"CUDA_VISIBLE_DEVICES": "0"} if ON_GPUS else {}
    command, began = [sys.executable, "-m", "recipes.grpo", str(file)], time.monotonic()
    run = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths} | seen, capture_output=True, text=True, timeout=400
    )
    print(f"\n{name}: exit code {run.returncode} after {time.monotonic() - began:.0f} s", flush=True)
    if run.returncode:
        print(run.stdout[-3000:], run.stderr[-3000:], flush=True)
        return
    for line in (out / name / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        print(
            {key: round(value, 5) for key, value in row.items() if key == "step" or key.startswith("sync/")}
        )


class Policy:
    """A model on GPU 0 as a stream, and Adam's first steps on it: each value moves by the learning rate."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.masters: dict[str, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter([(name, p.detach()) for name, p in self.model.named_parameters()])

    @torch.no_grad()
    def canary(self) -> tuple[list[int], list[float]]:
        ids = [(i * 37 + 5) % 4000 for i in range(48)]
        at = torch.tensor([ids], device=self.model.device)
        logits = self.model(at).logits[0, :-1].float()
        return ids, logits.log_softmax(-1).gather(-1, at[0, 1:, None])[:, 0].tolist()

    @torch.no_grad()
    def step(self) -> None:
        for name, p in self.model.named_parameters():
            master = self.masters.setdefault(name, p.detach().float().clone())
            master += LR * torch.randn_like(master).sign()
            p.copy_(master)

    @torch.no_grad()
    def shift(self) -> None:
        """Another version of a model whose masters have no room."""
        for p in self.model.parameters():
            p.mul_(1 + 2**-6)


def syncs(policy: Policy, tokenizer: Any, url: str, out: Path, *, kinds: str, times: int, full: bool) -> None:
    """Publishes `times` versions by each transport, and prints what each took."""
    token = read_token(out / "token")
    port = free_port()
    makers: dict[str, Any] = {
        "files": partial(WeightFiles, out / "weights"),
        "nccl": partial(WeightBroadcast, url=f"nccl://127.0.0.1:{port}", timeout_s=120.0),
    }
    for kind in kinds.split():
        fleet = Fleet(
            [url],
            token,
            connect=lambda url: connect(url, token, dtype=DTYPE, max_model_len=MAX_LEN, timeout_s=120.0),
            files=makers[kind],
            tolerance=0.2,
            timeout_s=200.0,
            note=lambda said: print("fleet:", said, flush=True),
        )
        engine = VllmEngine(fleet, tokenizer, max_model_len=MAX_LEN, timeout_s=200.0)
        written = timed_write(fleet.files)
        try:
            for version in range(1, times + 1):
                report = publish(engine, policy, version=version, canary_waits=True)
                waited = report.seconds  # what a step waits for: the canary is compared beside sampling
                report = report.verdict() if report.verdict else report
                push: Any = fleet.files and fleet.files.whole() if kind == "nccl" else fleet.files._committed  # type: ignore[union-attr]
                parts = " ".join(f"{part} {seconds:.3f}" for part, seconds in report.parts.items())
                said = (
                    f"{kind} version {version} {'delta' if push.base else 'whole'}: {push.num_bytes:,} bytes"
                )
                size = sum(held.num_bytes for held in engine.tensors.values())
                said += f" of {size:,} ({push.changed:.2%} of the values), {waited:.3f} s"
                said += f" ({parts}; of send, writing {written[-1]:.3f}), "
                print(f"{said}canary {report.canary_mean_gap:.4f} nats", flush=True)
                policy.step() if full else policy.shift()
        finally:
            engine.close()


def timed_write(files: Any) -> list[float]:
    """Seconds of each `write`, from now on: what is left of "send" is the servers' proof."""
    seconds: list[float] = []
    plain = files.write

    def write(*of: Any, **named: Any) -> Any:
        began = time.perf_counter()
        push = plain(*of, **named)
        seconds.append(time.perf_counter() - began)
        return push

    files.write = write
    return seconds


def big_model(out: Path, config_folder: str | None, tokenizer: Any) -> tuple[Path, Any]:
    """A folder with a config of Llama-3-8B's shape and no weights; and such a model, random, on GPU 0."""
    shape = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config = AutoConfig.from_pretrained(config_folder) if config_folder else shape
    folder = out / "big"
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device("cuda:0" if ON_GPUS else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE)
    return folder, model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--big", action="store_true", help="also a random model of 8B's shape, by NCCL only")
    parser.add_argument("--config", help="folder whose config.json the big model takes instead")
    parser.add_argument("--parts", default="sync train", help="sync, train or both")
    asked = parser.parse_args()
    out = asked.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    (out / "reward_of_vowels.py").write_text(REWARD)
    rows = [{"prompt": f"Write about the number {k}."} for k in range(64)]
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, device = asked.model.absolute(), "cuda:0" if ON_GPUS else "cpu"
    print(f"torch {torch.__version__}, on {'two GPUs' if ON_GPUS else 'the CPU'}", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(model)
    needs_small = set(asked.parts.split()) & {"sync", "train"}
    with serving_on(model, out) if needs_small else nullcontext([""]) as (url,):
        if "sync" in asked.parts:
            policy = Policy(AutoModelForCausalLM.from_pretrained(model, dtype=DTYPE).to(device))
            syncs(policy, tokenizer, url, out, kinds="files nccl", times=4, full=True)
            del policy
            if ON_GPUS:
                torch.cuda.empty_cache()
        if "train" in asked.parts:
            train(model, out, url, "by_files", {})
            train(model, out, url, "by_nccl", {"weights_url": f"nccl://127.0.0.1:{free_port()}"})
    if asked.big or asked.config:
        folder, big = big_model(out, asked.config, tokenizer)
        with serving_on(folder, out, "--load-format", "dummy") as (url,):
            syncs(Policy(big), tokenizer, url, out, kinds="nccl", times=4, full=False)


if __name__ == "__main__":
    main()
