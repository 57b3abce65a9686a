"""What the processes of a run do together in a step: who trains which group, and the sum of all gradients.

Groups are sampled by count and trained by predicted cost: the slowest process decides how long a step takes.
Weights of tokens are global shares, so it does not matter to the gradient who computes a row.
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
from rl.store.ledger_lines import decode_advantages, decode_group, encode_group
from rl.types import Advantage, ScoredGroup, Team

CONTEXT_COST = 1 / (6 * 2048)
"""Attention to a token of context, in parts of all else that a token costs: 1 / (6 width of the model)."""
GAIN = 0.01
"""Of the mean load: what moving a group must take off the greatest one at least."""
Named = Sequence[tuple[str, nn.Parameter]]
BUCKET_BYTES = 64 << 20
IN_FLIGHT = 2
"""Buckets that are on their way at once; each takes its bytes beside the gradients."""


class SummedGradients:
    """grad <- sum of grad over all processes, in flat buckets; a process without a gradient adds zeros.

    Buckets go in one order on all processes: the last parameters' first, as a backward pass ends with the
    first ones. From `begin` on a bucket is sent as soon as it and all before it are there; `finish` sends the
    others. So processes agree however much work each has, and one that has none sends all at the end.

    Args:
        trainable: names and parameters, the same ones in the same order on all processes.
        num_processes: alone, nothing is summed.
    """

    def __init__(
        self, trainable: Callable[[], Named], num_processes: int, *, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self.trainable, self.num_processes, self.bucket_bytes = trainable, num_processes, bucket_bytes
        self._bucket_of: dict[nn.Parameter, int] = {}
        self._missing: list[set[nn.Parameter]] = []
        self._sent: deque[tuple[int, Tensor, Any]] = deque()
        self._next = 0

    @cached_property
    def buckets(self) -> list[list[nn.Parameter]]:
        return in_buckets([p for _, p in self.trainable()][::-1], self.bucket_bytes)

    def begin(self, *, last: bool) -> None:
        """To be called before each backward pass. In deterministic mode all is left to `finish`."""
        if self.num_processes == 1 or not last or torch.are_deterministic_algorithms_enabled():
            return
        if not self._bucket_of:
            self._bucket_of = {p: n for n, bucket in enumerate(self.buckets) for p in bucket}
            for parameter in self._bucket_of:
                parameter.register_post_accumulate_grad_hook(self._note)
        self._missing = [set(bucket) for bucket in self.buckets]

    def finish(self, max_norm: float) -> float:
        """Sends what was not sent yet, waits for all, clips, and returns the norm before."""
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
        # A large one is summed where it lies: beside a head's gradient there may be no room for another.
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
    """Consecutive parameters of one dtype, of so many bytes together or a single one."""
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
    """Tokens that are computed for a group, and their attention; 0 where no row of it is trained on."""
    cost, prompt = 0.0, 0
    for completion, advantage in zip(group.completions, advantages, strict=True):
        has_signal = any([advantage] if isinstance(advantage, float | int) else advantage)
        if completion.finish_reason == "abort" or (rules.skip_without_signal and not has_signal):
            continue
        prompts = [group.prompt.token_ids, *(c.prompt_token_ids for c in completion.continuations)]
        for ids, row in zip(prompts, completion.rows, strict=True):
            before, own = len(ids), len(row.token_ids)
            cost += own * (1 + CONTEXT_COST * (before + own / 2)) + before * (not rules.share_prompts)
            prompt = max(prompt, before)
    return cost + prompt * rules.share_prompts


def shared_out(costs: Sequence[Sequence[float]]) -> list[list[int]]:
    """Who trains each group so that the greatest load is small: costs and result are [process][group].

    A group moves from the fullest process to the emptiest one as long as that helps; the others stay.
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
    """Who trains each of the groups that this process sampled; each minibatch is shared out by itself.

    Collective. In deterministic mode everybody trains what it sampled.
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
    owners: Sequence[int],
    num_minibatches: int,
    team: Team,
) -> tuple[list[ScoredGroup], list[list[Advantage]], list[int]]:
    """What this process trains: groups, advantages, and the minibatch of each. Collective.

    They travel in the form that the ledger has them in, and stand in the order of process and group.
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
