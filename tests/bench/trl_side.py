"""TRL's GRPOTrainer on the workload: `python -m tests.bench.trl_side MODEL_DIR OUT.json best|default`.

`best`: no gradient checkpointing and no second forward for the sampler mismatch, the settings in which
TRL 1.16 is fastest on the reference workload. Sampling is vLLM in its process on a GPU, `generate` on a
CPU. Phases are timed around TRL's own methods with the device synchronised; what is not sampling, scoring
or weight sync counts as training.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from tests.bench.workload import Workload, coin, now, prompt_texts


def main(model: str, out: Path, setting: str) -> None:
    workload, on_gpu = Workload.current(), torch.cuda.is_available()
    clock = Clock(out)
    micro_batch = min(workload.trl_micro_batch, workload.prompts * workload.group)
    best = setting == "best"
    config = GRPOConfig(
        output_dir=str(out.parent / f"trl-{setting}"),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=workload.prompts * workload.group // micro_batch,
        num_generations=workload.group,
        max_completion_length=workload.max_length,
        learning_rate=1e-6,
        max_steps=workload.steps,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        beta=0.0,
        gradient_checkpointing=not best,
        vllm_importance_sampling_correction=not best,
        model_init_kwargs={"dtype": "bfloat16" if on_gpu else "float32", "attn_implementation": "sdpa"},
        generation_kwargs={"stop_token_ids": workload.stop_ids} if on_gpu else {},
        disable_tqdm=True,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        use_vllm=on_gpu,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=0.35,
        vllm_max_model_length=workload.prompt_length + workload.max_length,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=coin,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompt_texts(workload)]),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=_lora(workload),
        callbacks=[clock],
    )
    if not on_gpu:
        trainer.generation_config.eos_token_id = workload.stop_ids
    clock.watch(trainer, "_generate", "sample")
    clock.watch(trainer, "_calculate_rewards", "score")
    if on_gpu:
        clock.watch(trainer.vllm_generation, "sync_weights", "sync")
    trainer.train()


def _lora(workload: Workload):
    if not workload.lora:
        return None
    from peft import LoraConfig

    return LoraConfig(r=workload.lora, lora_alpha=2 * workload.lora, target_modules="all-linear")


class Clock(TrainerCallback):
    """Seconds per phase of each step; the weight sync is inside the sampling call and is taken out of it."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.steps: list[dict[str, float]] = []
        self.now: dict[str, float] = {}
        self.tokens = 0

    def watch(self, owner, name: str, phase: str) -> None:
        inner = getattr(owner, name)

        def timed(*args, **kwargs):
            began = now()
            result = inner(*args, **kwargs)
            self.now[phase] = self.now.get(phase, 0.0) + now() - began
            if phase == "score":
                self.lengths = [len(ids) for ids in args[-1]]
            return result

        setattr(owner, name, timed)

    def on_step_begin(self, *_, **__) -> None:
        self.now, self.began = {}, now()

    def on_step_end(self, *_, **__) -> None:
        step = now() - self.began
        sync = self.now.get("sync", 0.0)
        sample, score = self.now.get("sample", 0.0) - sync, self.now.get("score", 0.0)
        self.steps.append(
            {
                "sample": sample,
                "score": score,
                "sync": sync,
                "train": step - sample - score - sync,
                "step": step,
                "tokens": sum(self.lengths),
                "peak": _peak(),
            }
        )
        self.out.write_text(json.dumps(self.steps))
        print(json.dumps({k: round(v, 2) for k, v in self.steps[-1].items()}), flush=True)


def _peak() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
