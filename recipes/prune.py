"""Makes a small student of a model, for distillation: `python -m recipes.prune MODEL FOLDER --layers 12`."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recipes.cli.command import run_command
from recipes.models import resolve_model
from rl.config import ModelConfig
from rl.model.exactness import backbone
from rl.model.loading import load_model, load_tokenizer
from rl.model.saving import save_model
from rl.report.safe_stream import say


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m recipes.prune", description=__doc__)
    parser.add_argument("model", help="hub name, folder, or smollm2-135m-instruct")
    parser.add_argument("folder", type=Path, help="the new folder to write")
    parser.add_argument(
        "--layers", help="how many to keep, evenly spaced, or which: 0,1,2,28,29; default: all"
    )
    parser.add_argument("--ffn", type=int, help="channels to keep of each layer's gated MLP; default: all")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(lambda: _write(make_parser().parse_args(argv)))


def kept_layers(asked: str, number: int) -> list[int]:
    """Layers to keep of `number`: those listed, or that many, evenly spaced, with the first and the last.

    DistilBERT keeps every second layer (arXiv:1910.01108, section 3). Minitron (arXiv:2408.11796) removes
    consecutive layers: list the others.

    Raises:
        ValueError: they are not layers of the model in rising order, or there are not that many.
    """
    words = [int(word) for word in asked.split(",") if word.isdecimal()]
    if asked.isdecimal() and 2 <= words[0] <= number:
        return [round(i * (number - 1) / (words[0] - 1)) for i in range(words[0])]
    if asked != ",".join(map(str, sorted(set(words)))) or len(words) < 2 or words[-1] >= number:
        raise ValueError(
            f"--layers {asked}: the model has layers 0 to {number - 1}; give a number from 2 to {number}, or "
            f"layers of it in rising order, such as --layers 0,{number - 1}"
        )
    return words


def cut_depth(model: Any, keep: Sequence[int]) -> None:
    """Removes, in place, all layers except `keep`, also from lists in the config with an entry per layer."""
    config, body = model.config.get_text_config(), backbone(model)
    number, body.layers = len(body.layers), nn.ModuleList(body.layers[i] for i in keep)
    lists = {k: v for k, v in config.to_dict().items() if isinstance(v, list) and len(v) == number}
    config.num_hidden_layers = len(keep)
    for name, values in lists.items():
        setattr(config, name, [values[i] for i in keep])


@torch.no_grad()
def cut_width(model: Any, size: int) -> None:
    """Keeps, in place, the `size` channels of each gated MLP with the greatest |gate| |up| |down|.

    That product bounds what a channel adds for inputs of equal norm. Minitron chooses by activations
    (arXiv:2407.14679), which would need data.

    Raises:
        ValueError: a layer has no gated MLP of plain matrices, or fewer channels.
    """
    config = model.config.get_text_config()
    for layer in backbone(model).layers:
        parts: list[Any] = [
            getattr(getattr(layer, "mlp", None), f"{x}_proj", None) for x in ("gate", "up", "down")
        ]
        if not all(isinstance(x, nn.Linear) for x in parts) or not 0 < size <= config.intermediate_size:
            raise ValueError(
                f"--ffn {size}: every layer needs a gated MLP of at least that many channels, and those of "
                f"{config.model_type} have {getattr(config, 'intermediate_size', 0)}; leave --ffn out"
            )
        gate, up, down = parts
        norms = gate.weight.norm(dim=1) * up.weight.norm(dim=1) * down.weight.norm(dim=0)
        keep = norms.topk(size).indices.sort().values
        down.weight = nn.Parameter(down.weight[:, keep])
        for part in (gate, up):
            part.weight = nn.Parameter(part.weight[keep])
            part.bias = None if part.bias is None else nn.Parameter(part.bias[keep])
    config.intermediate_size = size


def _write(arguments: argparse.Namespace) -> int:
    target: Path = arguments.folder
    if target.exists():
        raise ValueError(f"{target} already exists; name a new folder")
    config = ModelConfig(name=resolve_model(arguments.model), dtype="fp32")
    model: Any = load_model(config).eval()
    number, before = len(backbone(model).layers), model.num_parameters()
    keep = kept_layers(arguments.layers or str(number), number)
    cut_depth(model, keep)
    if arguments.ffn is not None:
        cut_width(model, arguments.ffn)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pruning-", dir=target.parent) as scratch, torch.no_grad():
        folder = Path(scratch) / "model"
        save_model(model, model, folder)
        load_tokenizer(config).save_pretrained(folder)
        saved: Any = load_model(ModelConfig(name=str(folder), dtype="fp32")).eval()
        ids = torch.arange(64)[None] % model.config.get_text_config().vocab_size
        ours, theirs = (m(input_ids=ids, use_cache=False).logits for m in (model, saved))
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"{model.config.model_type} has settings of layers that are not lists in its config, so the "
                "saved model would compute something else; nothing is written"
            )
        os.replace(folder, target)
    said = f"layers {', '.join(map(str, keep))} of {number}"
    say(f"{target}: {said}; {model.num_parameters():,} of {before:,} parameters")
    return 0


if __name__ == "__main__":
    sys.exit(main())
