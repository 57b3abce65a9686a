"""One rank of several: `python training.py MODEL_DIR DATA OUT key=value ...` writes the gradient and the
numbers of one training step.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from recipes.llada import build
from rl.config.diffusion import DiffusionConfig
from rl.config.read import read_config
from rl.diffusion.train import DiffusionRun, train_step
from rl.phases import StopSignal
from rl.report.display import Display
from rl.world import World


def make_run(model_dir: str, data: str, run_dir: str, *overrides: str) -> DiffusionRun:
    base = [
        f"model.name={model_dir}",
        "model.dtype=fp32",
        "model.mask_token=<unk>",
        f"data.source={data}",
        f"run_dir={run_dir}",
        "data.max_length=64",
        "train.examples_per_step=7",
        "train.token_budget=100000",
        "optimizer.max_grad_norm=1e9",
    ]
    config = read_config(DiffusionConfig, None, [*base, *overrides])
    config.run_dir.mkdir(parents=True, exist_ok=True)
    world = World(Accelerator(cpu=True))
    run, _ = build(
        config, world, stop=StopSignal(), display=Display(1, is_main=False), began=time.monotonic()
    )
    return run


def step_gradient(run: DiffusionRun, step: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """What one step would move along; the weights stay."""
    found: dict[str, torch.Tensor] = {}

    def record(*_: Any, **__: Any) -> None:
        for name, p in run.policy.trainable():
            if (grad := p.grad) is not None:
                found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad.clone()

    run.optimizer.step = record  # type: ignore[method-assign]
    return found, train_step(run, step)


def main(model_dir: str, data: str, out: str, *overrides: str) -> None:
    run = make_run(model_dir, data, f"{out}-run", *overrides)
    gradient, values = step_gradient(run)
    name = f"{out}-{run.world.rank}of{run.world.size}"
    save_file(gradient, f"{name}.safetensors")
    Path(f"{name}.json").write_text(json.dumps(values))


if __name__ == "__main__":
    main(*sys.argv[1:])
