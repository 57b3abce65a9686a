"""TRL's GRPOTrainer on a Cohort config: `python -m tests.bench.trl_curve OUT_DIR CONFIG [KEY=VALUE ...]`.

Same model, prompts in the same order, rewards, group size, loss, optimizer, learning rates and sampling; a
setting that TRL has no like of is refused. Sampling is vLLM in its process on a GPU, `generate` on a CPU. One
line a step goes to OUT_DIR/steps.jsonl, the weights to OUT_DIR/model.
"""

from __future__ import annotations

import json
import operator
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from recipes.models import resolve_model
from recipes.tasks import load_rows
from recipes.tasks.prompts import make_prompts, without
from rewards.adapters import as_trl
from rl.config import Config
from rl.config.read import load_config
from rl.optimizer import learning_rate_factor
from rollout.prompts import PromptStream

MICRO_BATCH = 16
OURS_ALONE = (
    "advantage",
    "train.num_epochs",
    "train.num_minibatches",
    "loss.mask_truncated",
    "loss.entropy_coef",
    "loss.dual_clip",
    "model.lora",
    "sampling.stop_token_ids",
)


def main(out: Path, config: Config) -> None:
    check(config)
    out.mkdir(parents=True, exist_ok=True)
    model, on_gpu = resolve_model(config.model.name), torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = Trainer(
        config=config,
        model=model,
        reward_funcs=[as_trl(s.name, **s.options) for s in config.rewards.functions],
        args=settings(out, config, on_gpu),
        train_dataset=Dataset.from_list(rows(config, tokenizer)),
        processing_class=tokenizer,
        callbacks=[Log(out / "steps.jsonl")],
    )
    trainer.train()
    trainer.save_model(str(out / "model"))
    tokenizer.save_pretrained(out / "model")


def check(config: Config) -> None:
    """Raises ValueError for what TRL's side would ignore."""
    plain = Config()
    wrong = [key for key in OURS_ALONE if operator.attrgetter(key)(config) != operator.attrgetter(key)(plain)]
    wrong += [f"rewards.functions of {s.name}" for s in config.rewards.functions if s.clip or s.requires]
    correction = config.loss.sampler_correction
    if correction and (correction.level, correction.mode, correction.low) != ("token", "truncate", 0.0):
        wrong.append("loss.sampler_correction")
    if wrong:
        raise ValueError(f"TRL's side has nothing like {', '.join(wrong)}; leave it at its default")


class Trainer(GRPOTrainer):
    """With Cohort's learning rates: the first step of a warm-up is one, not a rate of 0."""

    def __init__(self, *, config: Config, **arguments: Any) -> None:
        self.of = config
        super().__init__(**arguments)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        o = self.of.optimizer
        factor = partial(
            learning_rate_factor,
            schedule=o.schedule,
            warmup_steps=o.warmup_steps,
            total_steps=self.of.train.steps,
        )
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler


def rows(config: Config, tokenizer: Any) -> list[dict[str, Any]]:
    """The prompts in the order in which Cohort's source consumes them, with the graders' columns."""
    held, said = config.evaluation.data, {"template_file": config.model.chat_template, "note": print}
    heldout = make_prompts(held, load_rows(held), tokenizer, "heldout", **said) if held else []
    made = make_prompts(config.data, load_rows(config.data), tokenizer, "train", **said)
    prompts = without(made, heldout, print)
    stream = PromptStream(prompts, seed=config.train.seed, shuffle=config.data.shuffle)
    chosen = [stream.at(n) for n in range(config.train.steps * config.train.prompts_per_step)]
    keys = {key for prompt in chosen for key, value in prompt.columns.items() if isinstance(value, str)}
    return [
        {"prompt": list(p.messages) or p.text} | {key: p.columns.get(key) for key in keys} for p in chosen
    ]


def settings(out: Path, config: Config, on_gpu: bool) -> GRPOConfig:
    train, loss, optimizer, sampling = config.train, config.loss, config.optimizer, config.sampling
    size = train.prompts_per_step * train.group_size
    micro_batch = min(MICRO_BATCH, size)
    correction = loss.sampler_correction
    return GRPOConfig(
        output_dir=str(out / "trainer"),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=size // micro_batch,
        num_generations=train.group_size,
        max_completion_length=sampling.max_completion_length,
        temperature=sampling.temperature,
        max_steps=train.steps,
        shuffle_dataset=False,
        seed=train.seed,
        loss_type=loss.name,
        beta=loss.kl_coef,
        epsilon=loss.clip_low,
        epsilon_high=loss.clip_high,
        reward_weights=[s.weight for s in config.rewards.functions],
        learning_rate=optimizer.lr,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        max_grad_norm=optimizer.max_grad_norm,
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        bf16=on_gpu and config.model.dtype == "bf16-mixed",
        use_cpu=not on_gpu,
        use_vllm=on_gpu,
        vllm_mode="colocate",
        vllm_importance_sampling_correction=correction is not None,
        vllm_importance_sampling_mode="token_truncate",
        vllm_importance_sampling_clip_max=correction.high if correction else None,
        vllm_gpu_memory_utilization=config.engine.gpu_share,
        vllm_max_model_length=config.data.max_prompt_length + sampling.max_completion_length,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )


class Log(TrainerCallback):
    """Seconds from step to step (the first from the start of training), mean reward and completion length."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_begin(self, *_, **__) -> None:
        self.began = time.perf_counter()
        self.file.write_text("")

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if not logs or "reward" not in logs:
            return
        row = {
            "step": state.global_step,
            "seconds": time.perf_counter() - self.began,
            "reward": logs["reward"],
            "length": logs["completions/mean_length"],
        }
        with self.file.open("a") as sink:
            sink.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), load_config(sys.argv[2], sys.argv[3:]))
