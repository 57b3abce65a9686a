"""One rank of two: `python sharded.py MODEL_DIR OUT`; gradients of a model that FSDP2 shards over the ranks,
gathered again.
"""

from __future__ import annotations

import sys

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from rl.diffusion.model import DiffusionScorer, load_diffusion_model
from rl.model.bidirectional import Documents

DOCUMENTS = ([5, 9, 1], [12, 4])  # of rank 0 and rank 1


def row(rank: int) -> tuple[torch.Tensor, Documents, torch.Tensor]:
    """Token ids, documents and scored columns of a rank."""
    documents = Documents.of(DOCUMENTS[rank])
    generator = torch.Generator().manual_seed(rank)
    ids = torch.randint(4, 60, (documents.num_tokens,), generator=generator)
    return ids, documents, torch.arange(1 - rank, len(ids), 3)


def backward(scorer: torch.nn.Module, rank: int, mask_token_id: int) -> None:
    ids, documents, columns = row(rank)
    noisy = ids.index_fill(0, columns, mask_token_id)
    scorer(noisy, documents, columns, ids[columns])[0].sum().backward()


def main(model_dir: str, out: str) -> None:
    rank = Accelerator(cpu=True).process_index
    model = load_diffusion_model(model_dir).double()
    scorer = DiffusionScorer(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(scorer, mesh=mesh)
    backward(scorer, rank, model.config.mask_token_id)
    # FSDP averages over ranks; this project sums.
    whole = {n: 2 * p.grad.full_tensor() for n, p in model.named_parameters()}  # type: ignore[union-attr]
    if rank == 0:
        save_file(whole, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
