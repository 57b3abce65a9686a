"""A training step of a mixture of experts at OLMoE-1B-7B's shape: tokens/s, MFU and memory by way of
computing.

Weights are random and made on the device. Each row is a process of its own with a time limit; a row that
does not fit the memory says so. "kept": activations are not computed again. MFU counts three forward passes
of the active parameters for each row, also where frozen weights take no gradient: there the work is two.
`python -m tests.bench.moe_step` takes 5 to 8 minutes on one H200; `--tiny` runs anywhere."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from transformers import AutoModelForCausalLM, OlmoeConfig

from rl.config.sections import LoraConfig
from rl.moe.adapters import audit, lora_plan, split_experts
from rl.moe.esft import TrainedExperts, train_only
from tests.bench.flops import forward_flops, peak_flops


@dataclass(frozen=True)
class Row:
    """How a step is made.

    Attributes:
        way: the experts implementation. batched_mm copies weights for each token: out of reach here.
        trained: "all", "lora" (peft's own), "split" (beside the weights) or "esft".
        masters: fp32 weights beside bf16 computation; else bf16 weights.
        recompute: gradient checkpointing.
        trl: by TRL's SFTTrainer, which computes with bf16 weights here.
    """

    way: str
    trained: str
    masters: bool = False
    recompute: bool = True
    trl: bool = False


ROWS = {
    "LoRA r16, TRL": Row("grouped_mm", "lora", trl=True),
    "LoRA r16, TRL, kept": Row("grouped_mm", "lora", trl=True, recompute=False),
    "LoRA r16, peft's own": Row("grouped_mm", "lora"),
    "LoRA r16, split": Row("grouped_mm", "split"),
    "LoRA r16, split, kept": Row("grouped_mm", "split", recompute=False),
    "ESFT, 5 of 64": Row("grouped_mm", "esft"),
    "all bf16, TRL": Row("grouped_mm", "all", trl=True),
    "all bf16, grouped_mm": Row("grouped_mm", "all"),
    "all bf16, kept": Row("grouped_mm", "all", recompute=False),
    "all bf16, eager": Row("eager", "all"),
    "all fp32 masters": Row("grouped_mm", "all", masters=True),
}
TINY = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 4, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 512}
FAILED_FOR_MEMORY = 3
PER_PASS = int(os.environ.get("PER_PASS", "8192"))  # tokens of a micro-batch, of both sides


def make_model(tiny: bool, row: Row, device: torch.device):
    """OLMoE-1B-7B: OlmoeConfig's defaults, except for experts of 1,024 channels instead of 2,048."""
    config = OlmoeConfig(**(TINY if tiny else {"intermediate_size": 1024}))
    with torch.device(device):
        dtype = torch.float32 if row.masters else torch.bfloat16
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.set_experts_implementation(row.way)
    if row.recompute and not row.trl:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def adapters(model) -> PeftConfig:
    return PeftConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM", **lora_plan(model, LoraConfig()))


def restrict(model, trained: str) -> None:
    if trained == "esft":
        train_only(model, TrainedExperts({i: list(range(5)) for i in range(model.config.num_hidden_layers)}))
    if trained in ("all", "esft"):
        split_experts(model)
    if trained in ("lora", "split"):
        get_peft_model(model, adapters(model))
        model.enable_input_require_grads()
        assert trained == "lora" or len(split_experts(model)) == model.config.num_hidden_layers


def measure(row: Row, tiny: bool, num_rows: int, length: int, steps: int) -> dict[str, float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = make_model(tiny, row, device)
    flops = 3 * num_rows * forward_flops(model, length)
    ids = torch.randint(0, model.config.vocab_size, (num_rows, length), device=device)
    took, loss = (by_trl if row.trl else by_hand)(model, row, ids, steps)
    seconds = min(took[1:])
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return {
        "tokens/s": num_rows * length / seconds,
        "MFU": flops / seconds / peak_flops(),
        "peak GiB": peak,
        "trained M": sum(t for t, _ in audit(model).values()) / 1e6,
        "loss": loss,
    }


def by_hand(model, row: Row, ids: torch.Tensor, steps: int) -> tuple[list[float], float]:
    """Seconds of each step, the first to warm up, and the last loss; of `PER_PASS` tokens a micro-batch."""
    restrict(model, row.trained)
    values = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(values, lr=1e-5, weight_decay=0.0, fused=ids.is_cuda)
    took = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        for one in ids.split(per_pass(ids)):
            with torch.autocast(ids.device.type, torch.bfloat16):
                loss = model(input_ids=one, labels=one, use_cache=False).loss
            (loss * len(one) / len(ids)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ids.is_cuda:
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return took, loss.item()


def by_trl(model, row: Row, ids: torch.Tensor, steps: int) -> tuple[list[float], float]:
    """The same by TRL's SFTTrainer, whose own loop is timed from step to step."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    took: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            took.append(-time.perf_counter())

        def on_step_end(self, *_, **__):
            if ids.is_cuda:
                torch.cuda.synchronize()
            took[-1] += time.perf_counter()

    words = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    trainer = SFTTrainer(
        model,
        SFTConfig(
            tempfile.mkdtemp(),
            max_steps=steps + 1,
            per_device_train_batch_size=per_pass(ids),
            gradient_accumulation_steps=len(ids) // per_pass(ids),
            learning_rate=1e-5,
            max_length=None,
            gradient_checkpointing=row.recompute,
            bf16=True,
            use_cpu=not ids.is_cuda,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids.tolist() * (steps + 1)}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, eos_token="<eos>", pad_token="<eos>"
        ),
        peft_config=adapters(model) if row.trained == "lora" else None,
        callbacks=[Clock()],
    )
    trainer.train()
    return took, trainer.state.log_history[-2]["loss"]


def per_pass(ids: torch.Tensor) -> int:
    return min(len(ids), max(1, PER_PASS // ids.shape[1]))


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
    parser.add_argument("--only", help="rows, between semicolons")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rows", type=int, default=16, help="sequences of a step")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=4, help="measured steps after one to warm up")
    parser.add_argument("--timeout", type=int, default=150, help="seconds for one row")
    arguments = parser.parse_args(argv)
    if arguments.row:
        try:
            found = measure(
                ROWS[arguments.row], arguments.tiny, arguments.rows, arguments.length, arguments.steps
            )
        except torch.OutOfMemoryError:
            sys.exit(FAILED_FOR_MEMORY)
        print(json.dumps(found))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}, torch {torch.__version__}, {arguments.rows} x {arguments.length} tokens a step")
    names = ("tokens/s", "MFU", "peak GiB", "trained M", "loss")
    print(f"| {'step':24} | " + " | ".join(f"{n:>9}" for n in names) + " |\n|---|" + "---:|" * len(names))
    for row in arguments.only.split(";") if arguments.only else ROWS:
        found = run(row, arguments)
        shown = found if isinstance(found, str) else " | ".join(f"{found[n]:9.4g}" for n in names)
        print(f"| {row:24} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
