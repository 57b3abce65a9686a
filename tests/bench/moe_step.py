"""A training step of a mixture of experts at OLMoE-1B-7B's shape: tokens/s, MFU and memory by way of
computing.

Weights are random and made on the device. Each row is a process of its own with a time limit; a row that
does not fit the memory says so. `python -m tests.bench.moe_step` takes 5 to 8 minutes on one H200;
`--tiny` runs anywhere."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

from rl.config.sections import LoraConfig
from rl.moe.adapters import audit, lora_plan, split_experts
from rl.moe.esft import TrainedExperts, train_only
from rl.moe.kernels import forward_flops
from tests.bench.flops import peak_flops

# Name -> (experts implementation, what is trained). batched_mm copies weights for each token: out of reach
# here.
ROWS = {
    "all weights, grouped_mm": ("grouped_mm", "all"),
    "all weights, eager": ("eager", "all"),
    "LoRA r16, peft's own": ("grouped_mm", "lora"),
    "LoRA r16, split": ("grouped_mm", "split"),
    "ESFT, 5 of 64 experts": ("grouped_mm", "esft"),
}
TINY = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 512}
FAILED_FOR_MEMORY = 3


def make_model(tiny: bool, trained: str, device: torch.device):
    """OlmoeConfig's defaults are OLMoE-1B-7B's shape: 16 layers, 64 experts, 8 per token."""
    config = OlmoeConfig(**(TINY if tiny else {}))
    # fp32 master weights beside bf16 computation, as model.dtype=bf16-mixed; a frozen base needs no master.
    dtype = torch.float32 if trained == "all" else torch.bfloat16
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def restrict(model, trained: str) -> None:
    if trained == "esft":
        train_only(model, TrainedExperts({i: list(range(5)) for i in range(model.config.num_hidden_layers)}))
    if trained in ("all", "esft"):
        split_experts(model, mixed=True)
    if trained in ("lora", "split"):
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model

        plan = lora_plan(model, LoraConfig())
        get_peft_model(model, PeftConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM", **plan))
        model.enable_input_require_grads()
        assert trained == "lora" or len(split_experts(model)) == model.config.num_hidden_layers


def measure(row: str, tiny: bool, num_rows: int, length: int, steps: int) -> dict[str, float]:
    way, trained = ROWS[row]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = make_model(tiny, trained, device)
    flops = 3 * num_rows * forward_flops(model, length)
    restrict(model, trained)
    model.set_experts_implementation(way)
    values = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(values, lr=1e-5, weight_decay=0.0, fused=device.type == "cuda")
    ids = torch.randint(0, model.config.vocab_size, (num_rows, length), device=device)
    took = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        for one in ids.split(max(1, 8192 // length)):  # micro-batches of at most 8,192 tokens
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(input_ids=one, labels=one, use_cache=False).loss
            (loss * len(one) / num_rows).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    seconds = min(took[1:])
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return {
        "tokens/s": num_rows * length / seconds,
        "MFU": flops / seconds / peak_flops(),
        "peak GiB": peak,
        "trained M": sum(t for t, _ in audit(model).values()) / 1e6,
        "loss": loss.item(),
    }


def run(row: str, arguments: argparse.Namespace) -> dict[str, float] | str:
    command = [sys.executable, "-m", "tests.bench.moe_step", "--row", row]
    for name in ("rows", "length", "steps"):
        command += [f"--{name}", str(getattr(arguments, name))]
    try:
        done = subprocess.run(
            [*command, *(["--tiny"] if arguments.tiny else [])],
            capture_output=True,
            text=True,
            timeout=arguments.timeout,
        )
    except subprocess.TimeoutExpired:
        return f"took longer than {arguments.timeout} s"
    if done.returncode == FAILED_FOR_MEMORY:
        return "does not fit the memory"
    assert done.returncode == 0, f"{row}: exit code {done.returncode}\n{done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row", choices=ROWS, help="measure this one in this process")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rows", type=int, default=16, help="sequences of a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=4, help="measured steps after one to warm up")
    parser.add_argument("--timeout", type=int, default=150, help="seconds for one row")
    arguments = parser.parse_args(argv)
    if arguments.row:
        try:
            found = measure(arguments.row, arguments.tiny, arguments.rows, arguments.length, arguments.steps)
        except torch.OutOfMemoryError:
            sys.exit(FAILED_FOR_MEMORY)
        print(json.dumps(found))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}, {arguments.rows} x {arguments.length} tokens a step")
    names = ("tokens/s", "MFU", "peak GiB", "trained M", "loss")
    print(f"| {'step':24} | " + " | ".join(f"{n:>9}" for n in names) + " |\n|---|" + "---:|" * len(names))
    for row in ROWS:
        found = run(row, arguments)
        shown = found if isinstance(found, str) else " | ".join(f"{found[n]:9.4g}" for n in names)
        print(f"| {row:24} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
