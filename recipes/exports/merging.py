"""Writes a model's folder, and proves that it holds what was trained.

1. After merging in fp32, each adapted tensor is compared with W + s B A, computed in fp64 from the adapter's
   file. This finds a wrong scale, a skipped layer and a transposed delta, however small the adapter is.
2. After the cast each tensor that transformers reads from the folder equals the one that was written.
3. Log-probs of fixed tokens agree within `LIMIT`: of adapter and merged model before the cast, of cast model
   and folder. Only the order of fp32 sums may differ. The card says what the cast changes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, load_peft_weights
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rl.config import ModelConfig
from rl.model.adapter_folder import Adapter, attach
from rl.model.adapters import FORMS, original_name
from rl.model.loading import load_model, read_config
from rl.model.saving import save_model
from rl.packed_check import own_logprobs
from rl.weights import CANARY_LENGTH, CANARY_TEXT

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LIMIT = 1e-3  # nats, of any token: fp32 sums in another order move most models' log-probs by some 1e-5
U32 = 2.0**-24  # unit roundoff of fp32: half the distance from 1 to the next number


def write_proved(
    stage: Path, source: Path, adapter: Adapter | None, wanted: torch.dtype | None
) -> dict[str, Any]:
    """Writes the model of `source`, or its adapter merged into the base; raises ValueError if a proof fails.

    Args:
        wanted: dtype of the tensors; None: as they are stored, for a merged model as its base's are.

    Returns:
        Facts for the card; `gap` and `adapter_moves` are the largest of any token, in nats.
    """
    facts: dict[str, Any] = {}
    if adapter is None:
        stored = load_file(next(source.glob("*.safetensors")))  # config.json has the dtype of computation
        model, dtype = load_whole(source), wanted or next(iter(stored.values())).dtype
        rows = fixed_ids(source, model)
        expected = logprobs(model, rows)
    else:
        usual, settings = LoraConfig().to_dict(), adapter.settings
        for key in {"peft_type", *FORMS} - {"target_parameters"}:
            if (settings.get(key) or None) != (usual.get(key) or None):
                raise ValueError(f"--merge proves plain LoRA only; this adapter has {key}={settings[key]!r}")
        below = ModelConfig(name=adapter.base, revision=adapter.revision, dtype="fp32")
        dtype = wanted or getattr(read_config(below), "dtype", None) or torch.float32
        base = load_model(below).eval()
        rows = fixed_ids(source, base)
        plain, adapted = logprobs(base, rows), attach(base, adapter).eval()
        expected = logprobs(adapted.get_base_model(), rows)
        model = merge_layers(adapted, adapter)
        _check_gap("the merged model and the adapter", model, rows, expected)
        facts = {"form": "merged", "adapter_moves": (expected - plain).abs().max().item()}
    for tensor in model.state_dict(keep_vars=True).values():  # buffers that are computed anew stay
        tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data
    save_model(model, model, stage)
    written, again = model.float().state_dict(), load_whole(stage)
    if odd := [
        n for n, t in again.state_dict().items() if n not in written or not torch.equal(t, written[n])
    ]:
        raise ValueError(f"the export is broken: {odd[0]} on disk is not what was written")
    found = logprobs(again, rows)
    _check_gap("the folder and the model that was written", model, rows, found)
    gap = (found - expected).abs().max().item()
    return {"dtype": str(dtype).removeprefix("torch."), "tokens": len(found), "gap": gap, **facts}


def merge_layers(adapted: Any, adapter: Adapter) -> PreTrainedModel:
    """Merges layer by layer, and compares each with W + s B A from its old weight and the file's factors.

    The sum's rounding error is at most u |sum| + (r + 3) u s |B| |A|. Source: Higham, Accuracy and Stability
    of Numerical Algorithms, 2002, equation 3.5.

    Raises:
        ValueError: a weight is not W + s B A, a layer is not linear, or a factor belongs to no layer.
    """
    left = load_peft_weights(str(adapter.folder), device="cpu")
    scale = adapter.settings["lora_alpha"] / adapter.settings["r"]
    for name, layer in adapted.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        tensor = getattr(layer, "parameter_name", "weight")
        own = original_name(f"{name.removeprefix('base_model.model.')}.base_layer.{tensor}")
        factors = [left.pop(f"{name}.lora_{side}.weight", None) for side in "AB"]
        inner, stacked = layer.get_base_layer(), hasattr(layer, "parameter_name")
        if not (stacked or isinstance(inner, nn.Linear)) or any(f is None for f in factors):
            raise ValueError(f"--merge has no proof for {own}, a {type(inner).__name__}")
        a, b = (cast(Tensor, factor).double() for factor in factors)
        weight = getattr(inner, tensor).data
        if weight.ndim == 3:  # all experts; peft stacks A with the expert outermost, B with it innermost
            a, b = a.view(len(weight), -1, a.shape[1]), b.view(len(b), -1, len(weight)).permute(2, 0, 1)
            if getattr(inner, "is_transposed", False):
                a, b = b.mT, a.mT
        exact = weight.double() + scale * (b @ a)
        cast(Any, layer).merge()
        allowed = 1.01 * U32 * (exact.abs() + (a.shape[-2] + 3) * abs(scale) * (b.abs() @ a.abs()))
        gaps = (getattr(inner, tensor).data.double() - exact).abs()
        if num := int((~(gaps <= allowed)).sum()):
            raise ValueError(
                f"the merge is broken: {own} differs from W + {scale:g} B A at {num} of {gaps.numel()} "
                f"places, by up to {gaps.max().item():.2g}"
            )
    if left:
        raise ValueError(f"the merge is broken: {len(left)} tensors such as {min(left)} belong to no layer")
    return adapted.unload()


def _check_gap(what: str, model: PreTrainedModel, rows: list[Tensor], others: Tensor) -> None:
    ours = logprobs(model, rows)
    gap, rounding = ((x - ours).abs().max().item() for x in (others, logprobs(model, rows, behind=16)))
    if not gap <= (limit := max(LIMIT, min(4 * rounding, 10 * LIMIT))):
        raise ValueError(
            f"the export is broken: log-probs by {what} differ by {gap:.2g} nats, over {limit:.2g}"
        )


def fixed_ids(folder: Path, model: PreTrainedModel) -> list[Tensor]:
    """Two rows: the first tokens of a text, and ids from all over the vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    size = cast(Any, model.get_input_embeddings()).weight.shape[0]
    spread = [(i * 7919 + 13) % size for i in range(CANARY_LENGTH)]
    text = tokenizer(CANARY_TEXT, add_special_tokens=False)["input_ids"][:CANARY_LENGTH]
    return [torch.tensor(row) for row in (text, spread)]


@torch.no_grad()
def logprobs(model: PreTrainedModel, rows: list[Tensor], *, behind: int = 0) -> Tensor:
    """Log-probs of all tokens except each row's first, in nats; `behind`: as in `own_logprobs`."""
    return torch.cat([own_logprobs(model, row, behind=behind) for row in rows])


def load_whole(folder: Path) -> PreTrainedModel:
    """The model of a folder in fp32; raises ValueError if a tensor is missing, left over or misshapen."""
    options: Any = {"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": False}
    model, said = cast(Any, AutoModelForCausalLM.from_pretrained(folder, **options))
    if odd := [f"{what} {said[what]}" for what in said if what.endswith("_keys") and said[what]]:
        raise ValueError(f"the folder is broken: transformers finds {odd[0]:.200}")
    return model.eval()
