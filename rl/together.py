"""What the processes of a run do together in a step: sharing out groups, and summing gradients.

Processes sample equally many groups, and train groups of about equal predicted cost: the slowest process
decides how long a step takes. Token weights are global, so gradients do not depend on who computes a row.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rl.batch import PackRules
from rl.model.linear import adding
from rl.store.ledger_lines import decode_advantages, decode_group, encode_group
from rl.types import Advantage, ScoredGroup, Team

CONTEXT_COST = 1 / (6 * 2048)
"""Cost of attention to a token of context / all other cost of a token: 1 / (6 * width of the model)."""
GAIN = 0.01
"""A group moves only if that lowers the greatest load by this share of the mean load or more."""
Named = Sequence[tuple[str, nn.Parameter]]
BUCKET_BYTES = 64 << 20
IN_FLIGHT = 2
"""Buckets being sent at once; each takes memory for its bytes beside the gradients."""


class SummedGradients:
    """grad <- sum of grad over all processes, in flat buckets; a process without a gradient adds zeros.

    All processes send buckets in the same order: the last parameters first, as a backward pass does. In the
    last one, a bucket is sent as soon as it and all before it are complete; `finish` sends the others. So
    processes agree however much work each has; one without work sends everything at the end.

    Args:
        trainable: names and parameters, equal and in the same order on all processes.
        num_processes: 1: nothing is summed.
    """

    def __init__(self, trainable: Callable[[], Named], num_processes: int) -> None:
        self.trainable, self.num_processes = trainable, num_processes
        self._bucket_of: dict[nn.Parameter, int] = {}
        self._missing: list[set[nn.Parameter]] = []
        self._sent: deque[tuple[int, Tensor, Any]] = deque()
        self._next = 0

    @cached_property
    def buckets(self) -> list[list[nn.Parameter]]:
        return in_buckets([p for _, p in self.trainable()][::-1], BUCKET_BYTES)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """A backward pass, which sends buckets if it is the last one. In deterministic mode `finish` does."""
        if self.num_processes > 1 and last and not torch.are_deterministic_algorithms_enabled():
            if not self._bucket_of:
                self._bucket_of = {p: n for n, bucket in enumerate(self.buckets) for p in bucket}
                for parameter in self._bucket_of:
                    parameter.register_post_accumulate_grad_hook(self._note)
            self._missing = [set(bucket) for bucket in self.buckets]
        with adding():
            loss.backward()

    def finish(self, max_norm: float) -> float:
        """Sends the remaining buckets, waits for all, clips, and returns the norm before clipping."""
        while self.num_processes > 1 and self._next < len(self.buckets):
            self._send()
        while self._sent:
            self._take()
        self._missing, self._next = [], 0
        return nn.utils.clip_grad_norm_([p for _, p in self.trainable()], max_norm).item()

    def _note(self, parameter: nn.Parameter) -> None:
        if not self._missing:  # not the last pass of a step
            return
        number = self._bucket_of[parameter]
        assert number >= self._next, "a gradient grew after it was sent to the other processes"
        self._missing[number].discard(parameter)
        while self._next < len(self.buckets) and not self._missing[self._next]:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        if len(self._sent) == IN_FLIGHT:
            self._take()
        bucket = self.buckets[self._next]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        # A single gradient is summed in place: memory may not hold a second copy of the output head's.
        flat = grads[0].reshape(-1) if len(grads) == 1 else torch.cat([grad.reshape(-1) for grad in grads])
        self._sent.append((self._next, flat, torch.distributed.all_reduce(flat, async_op=True)))
        self._next += 1

    @torch.no_grad()
    def _take(self) -> None:
        number, flat, work = self._sent.popleft()
        work.wait()
        bucket = self.buckets[number]
        for parameter, piece in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(piece.view_as(parameter))


def in_buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Consecutive parameters of one dtype, of at most `bucket_bytes` together or a single one."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for parameter in parameters:
        if not buckets or size + parameter.nbytes > bucket_bytes or parameter.dtype != buckets[-1][0].dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
    return buckets


def predicted_cost(group: ScoredGroup, advantages: Sequence[Advantage], rules: PackRules) -> float:
    """Tokens to compute for a group, with attention added as tokens; 0 if none of its rows is trained on."""
    cost, shared = 0.0, len(group.prompt.token_ids) * rules.share_prompts
    for completion, advantage in zip(group.completions, advantages, strict=True):
        has_signal = any([advantage] if isinstance(advantage, float | int) else advantage)
        if completion.finish_reason == "abort" or (rules.skip_without_signal and not has_signal):
            continue
        prompts = [group.prompt.token_ids, *(c.prompt_token_ids for c in completion.continuations)]
        for ids, row in zip(prompts, completion.rows, strict=True):
            before, own = len(ids), len(row.token_ids)
            cost += own * (1 + CONTEXT_COST * (before + own / 2)) + max(before - shared, 0)
    return cost + shared * (cost > 0)


def shared_out(costs: Sequence[Sequence[float]]) -> list[list[int]]:
    """The process that trains each group, so that the largest load is small; both are [process][group].

    A group moves from the most to the least loaded process as long as that helps; the others stay.
    """
    owners = [[rank] * len(mine) for rank, mine in enumerate(costs)]
    loads = [sum(mine) for mine in costs]
    least = GAIN * sum(loads) / len(loads)
    while True:
        full, empty = loads.index(max(loads)), loads.index(min(loads))
        gap = loads[full] - loads[empty]
        movable = [
            (abs(gap / 2 - costs[rank][i]), rank, i)
            for rank, mine in enumerate(owners)
            for i, owner in enumerate(mine)
            if owner == full and least < costs[rank][i] <= gap - least
        ]
        if not movable:
            return owners
        _, rank, i = min(movable)
        owners[rank][i] = empty
        loads[full] -= costs[rank][i]
        loads[empty] += costs[rank][i]


def divide(costs: Sequence[float], num_minibatches: int, team: Team) -> list[int]:
    """The process that trains each group sampled here; each minibatch is shared out by itself.

    Collective. In deterministic mode each process trains what it sampled.
    """
    if team.size == 1 or torch.are_deterministic_algorithms_enabled():
        return [team.rank] * len(costs)
    everybody, size = team.gather(list(costs)), len(costs) // num_minibatches
    owners: list[int] = []
    for m in range(num_minibatches):
        owners += shared_out([mine[m * size : (m + 1) * size] for mine in everybody])[team.rank]
    return owners


def exchange(
    groups: Sequence[ScoredGroup],
    advantages: Sequence[Sequence[Advantage]],
    *,
    owners: Sequence[int],
    num_minibatches: int,
    team: Team,
) -> tuple[list[ScoredGroup], list[list[Advantage]], list[int]]:
    """What this process trains: groups, advantages, and the minibatch of each. Collective.

    Groups travel in the ledger's format, and are ordered by the process that sampled them.
    """
    size = max(1, len(groups) // num_minibatches)
    pairs = [(g, list(a), i // size) for i, (g, a) in enumerate(zip(groups, advantages, strict=True))]
    leaving = [
        [owner, m, encode_group(group, 0, {"advantages": row}).decode("utf-8", "surrogatepass")]
        for (group, row, m), owner in zip(pairs, owners, strict=True)
        if owner != team.rank
    ]
    staying = [pair for pair, owner in zip(pairs, owners, strict=True) if owner == team.rank]
    mine: list[tuple[ScoredGroup, list[Advantage], int]] = []
    for rank, sent in enumerate(team.gather(leaving) if team.size > 1 else [[]]):
        if rank == team.rank:
            mine += staying
        here = [(m, json.loads(text)) for owner, m, text in sent if owner == team.rank]
        mine += [(decode_group(line), decode_advantages(line), m) for m, line in here]
    return [g for g, _, _ in mine], [a for _, a, _ in mine], [m for _, _, m in mine]
