"""`summing_processes.py OUT`: two gloo processes sum gradients at the end of a step, and while it runs.

Each takes its own number of backward passes. Some leave a layer out; in one case the second process has none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.utils.checkpoint import checkpoint

import rl.together
from rl.model.linear import add_gradients_in_products
from rl.together import SummedGradients

SIZES = (40, 30, 20, 50, 10)


class Net(nn.Module):
    """Layers of different sizes: one is used twice, and one only in passes of even number. Half of
    them add their weights' gradients in a matrix product.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spare = nn.Linear(40, 60)  # a bucket of its own
        self.layers = nn.ModuleList(nn.Linear(40, size) for size in SIZES)
        self.back = nn.ModuleList(nn.Linear(size, 40) for size in SIZES)
        add_gradients_in_products(self.layers)

    def forward(self, x: torch.Tensor, number: int) -> torch.Tensor:
        def block(n: int, y: torch.Tensor) -> torch.Tensor:
            return self.back[n](self.layers[n](y).tanh())

        for n in (0, 1, 2, 3, 4, 1):
            x = x + checkpoint(block, n, x, use_reentrant=False)
        return (self.spare(x) if number % 2 == 0 else x).square().mean()


def step(net: Net, sums: SummedGradients | None, passes: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.grad = None
    for number in range(passes):
        loss = net(torch.randn(8, 40, generator=generator), number + (passes == 1))
        if sums is None:
            loss.backward()
        else:
            sums.backward(loss, last=number + 1 == passes)
    sent_before_the_end = sums._next if sums else 0
    if sums:
        sums.finish(1e9)
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}
    return {"sent": torch.tensor(sent_before_the_end)} | found


def main(out: str) -> None:
    rank = (accelerator := Accelerator(cpu=True)).process_index
    assert accelerator.num_processes == 2
    net, order, places, plain = Net(), [], [], dist.all_reduce

    def noted(tensor: torch.Tensor, *arguments: object, **named: object) -> object:
        order.append(tensor.numel())
        if tensor.numel() == net.spare.weight.numel() and (grad := net.spare.weight.grad) is not None:
            places.append(tensor.data_ptr() == grad.data_ptr())
        return plain(tensor, *arguments, **named)

    dist.all_reduce = noted
    rl.together.BUCKET_BYTES = 9000  # several buckets
    results = {}
    for case, passes in {"even": (2, 2), "uneven": (3, 1), "idle": (2, 0), "again": (1, 4)}.items():
        found = []
        for deterministic in (True, False):
            torch.use_deterministic_algorithms(deterministic)
            sums = results.setdefault("sums", SummedGradients(lambda: [*net.named_parameters()], 2))
            found.append(step(net, sums, passes[rank], 7 + rank))
        end, during = found
        gaps = [
            (end[n] - during[n]).norm() / end[n].norm().clamp(min=1e-30) for n, _ in net.named_parameters()
        ]
        results[case] = {"gap": max(gaps).item(), "sent": [f.pop("sent").item() for f in found]}
        results[case]["norm"] = torch.cat([g.flatten() for g in during.values()]).norm().item()
        alone = alone_gradients(net, passes)
        results[case]["alone"] = max(
            ((during[n] - alone[n]).norm() / alone[n].norm().clamp(min=1e-12)).item() for n in alone
        )
    results["buckets"] = len(results.pop("sums").buckets)
    results |= {"order": order, "in_place": places}
    Path(f"{out}/rank{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def alone_gradients(net: Net, passes: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The gradients of both processes' work, in this one and by autograd alone."""
    totals = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for rank, number in enumerate(passes):
        own = step(net, None, number, 7 + rank) if number else {}
        for name in totals:
            totals[name] += own.get(name, 0)
    return totals


if __name__ == "__main__":
    main(sys.argv[1])
