"""Fine-tuning with TRL: `accelerate launch -m recipes.sft recipes/configs/NAME.yaml key=value ...`.

It trains dense models and mixtures of experts. Their balance loss is exact per layer and over the whole step;
TRL's pools the layers and takes each micro-batch alone. Started again with the same run_dir, it resumes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback

from recipes.cli.command import leave
from recipes.models import resolve_model
from recipes.program import make_deterministic, recipe_main
from recipes.tasks import find_modules_beside, load_rows
from recipes.tasks.overlap import without_asked
from rl.config import ModelConfig
from rl.config.read import differing, dump_config, read_config
from rl.config.sft import SftConfig
from rl.diffusion.text import encode_rows
from rl.model.adapters import peft_config_of
from rl.model.loading import load_model, load_tokenizer
from rl.moe.adapters import lora_plan
from rl.phases import StopSignal
from rl.report.display import Display
from rl.report.observer import RunObserver
from rl.report.safe_stream import say
from rl.store.durable import run_lock
from rl.store.folder import claim_inputs, write_atomically
from rl.store.inputs import file_fingerprints, fingerprints
from rl.store.manifest import find_fault, write_manifest
from rl.store.metrics import Metric, MetricsLog
from rl.world import World

try:
    from trl import SFTConfig

    from recipes.sft_trainer import BalancedTrainer
except ImportError as error:
    raise SystemExit(
        f"cohort: recipes.sft trains with TRL, which is missing ({error}): pip install trl==1.16.0"
    ) from error

OWN = (
    Metric("sft/loss", "nats/token", "cross-entropy of the answers' tokens, plus the balance loss"),
    Metric("sft/token_accuracy", "share", "answers' tokens ranked first, as a mean of micro-batches"),
    Metric("sft/tokens", "tokens", "tokens computed so far"),
)
NAMES = {
    "loss": "sft/loss",
    "mean_token_accuracy": "sft/token_accuracy",
    "num_tokens": "sft/tokens",
    "entropy": "policy/entropy",
    "grad_norm": "policy/grad_norm",
    "learning_rate": "policy/lr",
}
PROBE_LENGTH = 64  # tokens of the first example; routing on them is compared with the first step's


class RunFiles(TrainerCallback):
    """Writes `metrics.jsonl` and the checkpoints' manifests as other recipes do; after a signal it stops at
    the end of the step.
    """

    def __init__(self, config: SftConfig, stop: StopSignal, world: World, display: Display) -> None:
        self.config, self.stop, self.world = config, stop, world
        self.log = MetricsLog(config.run_dir, own=OWN)
        self.observer = RunObserver(display, config, is_main=world.is_main)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.world.is_main:
            self.log.truncate_after(state.global_step)
            self.observer.goes_on(self.log.read())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= self.stop.requested()
        control.should_save |= control.should_training_stop or state.global_step >= state.max_steps

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Writes the manifest, which makes a checkpoint valid to resume from, then deletes older ones."""
        self.world.gather(None)  # each process has written its part
        if self.world.is_main:
            write_manifest(Path(args.output_dir, f"checkpoint-{state.global_step}"), state.global_step)
            for old in checkpoints_of(self.config.run_dir)[: -self.config.checkpoint.keep]:
                (old / "manifest.json").unlink()  # first, so that a killed removal leaves no checkpoint
                shutil.rmtree(old)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if not self.world.is_main or "loss" not in logs:
            return
        values = {name: v for key, v in logs.items() if "/" in (name := NAMES.get(str(key), str(key)))}
        self.log.write(state.global_step, values)
        self.observer.step(state.global_step, values)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains; returns the exit code of `recipe_main`."""

    def run(arguments: list[str], stop: StopSignal, began: float) -> int:
        path, *overrides = arguments
        find_modules_beside(path)
        config = read_config(SftConfig, path, overrides)
        with run_lock(config.run_dir) if is_first() else nullcontext():
            return train(config, stop)

    return recipe_main("recipes.sft", argv, run)


def train(config: SftConfig, stop: StopSignal) -> int:
    newest = claim(config)
    if newest is not None and int(newest.rpartition("-")[2]) >= config.train.steps:
        if is_first():  # the trainer would do one more step
            say(f"already finished: {write_result(config)}")
        return 0
    trainer, rows, dropped = make_trainer(config, newest)
    world = World(trainer.accelerator)
    stop.any_process = world.any
    if world.is_main:
        model = model_of(config)
        claim_inputs(
            config,
            fingerprints(model.name, trainer.processing_class, {"data": rows}, revision=model.revision)
            | file_fingerprints({"moe.trained_experts": config.moe.trained_experts}),
        )
        write_atomically(config.run_dir / "config.yaml", dump_config(config))
    with Display(config.train.steps, is_main=world.is_main) as display:
        if dropped:
            display.note(f"{dropped} examples beyond data.max_length={config.data.max_length} are left out")
        for sentence in trainer.said:
            display.note(sentence)
        files = RunFiles(config, stop, world, display)
        trainer.add_callback(files)
        trainer.train(resume_from_checkpoint=newest)
        steps = trainer.state.global_step
        if files.observer.report is not None:
            say(f"{write_result(config)}; report: {files.observer.report.finish()}")
        files.log.close()
        files.observer.close()
    world.end()
    return 0 if steps >= config.train.steps else stop.exit_code()


def make_trainer(config: SftConfig, newest: str | None = None) -> tuple[BalancedTrainer, Any, int]:
    """(trainer with the newest checkpoint's model, its rows, number of rows that were too long)."""
    make_deterministic(config.train.seed, kernels=True)
    args, model = arguments_of(config), model_of(config)
    tokenizer = load_tokenizer(model)
    warn = say if is_first() else lambda text: None
    rows = without_asked(config.overlap, load_rows(config.data.rows()), config.data.prompt_column, warn)
    examples, dropped = encode_rows(rows, config.data, tokenizer)
    columns = {"input_ids": [[*e.prompt.tolist(), *e.answer.tolist()] for e in examples]}
    columns["labels"] = [[-100] * len(e.prompt) + e.answer.tolist() for e in examples]
    at = lambda folder: model.model_copy(update={"name": folder, "revision": None})  # noqa: E731
    loaded = load_model(model if newest is None or config.model.lora else at(newest))
    trainer = BalancedTrainer(
        model=loaded,
        args=args,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        peft_config=peft_config_of(model, loaded, lora_plan) if config.model.lora else None,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.balance(config, torch.tensor(columns["input_ids"][0][:PROBE_LENGTH]))
    return trainer, rows, dropped


def model_of(config: SftConfig) -> ModelConfig:
    return ModelConfig.model_validate(config.model.model_dump() | {"name": resolve_model(config.model.name)})


def arguments_of(config: SftConfig) -> SFTConfig:
    """Raises ValueError if the examples of a step do not split over processes and passes."""
    t, o, on_gpu = config.train, config.optimizer, torch.cuda.is_available()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    passes, rest = divmod(t.examples_per_step, t.micro_batch * processes)
    if rest:
        raise ValueError(
            f"train.examples_per_step={t.examples_per_step} does not split over {processes} processes with "
            f"train.micro_batch={t.micro_batch}; use a multiple of {t.micro_batch * processes}"
        )
    return SFTConfig(
        output_dir=str(config.run_dir / "checkpoints"),
        max_steps=t.steps,
        per_device_train_batch_size=t.micro_batch,
        gradient_accumulation_steps=passes,
        seed=t.seed,
        learning_rate=o.lr,
        adam_beta1=o.betas[0],
        adam_beta2=o.betas[1],
        adam_epsilon=o.eps,
        weight_decay=o.weight_decay,
        max_grad_norm=o.max_grad_norm,
        lr_scheduler_type="constant_with_warmup" if o.schedule == "constant" else o.schedule,
        warmup_steps=o.warmup_steps,
        max_length=config.data.max_length,
        packing=t.packing,
        router_aux_loss_coef=0.0,  # TRL's own loss pools the layers
        gradient_checkpointing=config.model.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=config.model.dtype == "bf16-mixed",
        use_cpu=not on_gpu,
        save_strategy="steps" if config.checkpoint.every else "no",
        save_steps=config.checkpoint.every or t.steps,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )


def is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def write_result(config: SftConfig) -> str:
    """Writes `result.json` for the newest checkpoint, and returns a summary of it."""
    path = checkpoints_of(config.run_dir)[-1]
    result = {"steps": int(path.name.rpartition("-")[2]), "checkpoint": str(path.relative_to(config.run_dir))}
    write_atomically(config.run_dir / "result.json", json.dumps(result, indent=2) + "\n")
    return f"{result['steps']} steps; {path}"


def claim(config: SftConfig) -> str | None:
    """The newest undamaged checkpoint of the run, or None.

    Raises:
        ValueError: the folder holds a run with other settings, or all its checkpoints are damaged.
    """
    file, found = config.run_dir / "config.yaml", checkpoints_of(config.run_dir)
    newest = next((str(path) for path in reversed(found) if find_fault(path, {}) is None), None)
    if found and newest is None:
        faults = {path.name: find_fault(path, {}) for path in found}
        raise ValueError(
            f"every checkpoint of {config.run_dir} is damaged: {faults}; put back a copy, or use "
            "another run_dir"
        )
    if newest is not None and file.is_file():
        free = ("run_dir", "trackers", "checkpoint.", "train.steps")
        other = [k for k in differing(read_config(SftConfig, file), config) if not k.startswith(free)]
        if other:
            raise ValueError(
                f"{config.run_dir} holds a run with another {', '.join(other)}; use another run_dir"
            )
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return newest


def checkpoints_of(run_dir: Path) -> list[Path]:
    """Complete checkpoints, the oldest first."""
    found = (run_dir / "checkpoints").glob("checkpoint-*/manifest.json")
    return sorted((path.parent for path in found), key=lambda path: int(path.name.rpartition("-")[2]))


if __name__ == "__main__":
    leave(main())
