"""Losses that spread tokens over experts, exact over the whole optimizer step, and the loss-free bias.

Every loss is a mean of losses per layer: if layers were pooled before f and P are multiplied, their
imbalances could cancel. Given the sums of the whole step (`Load`), the step's loss is a sum over its
micro-batches and processes. So the gradient does not depend on how the step is cut. L layers, E experts, K
per token, N rows of a pass, G segments and S sequences in it. In a layer, f_i is expert i's share of choices
and P_i its mean probability.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.tensor import DTensor

from rl.batch import IDLE, MicroBatch
from rl.config.moe import MoeConfig
from rl.model.hollow import own_slice
from rl.moe.routers import RouterSite, observed, scores, watching

Metrics = dict[str, tuple[Tensor, Tensor]]
BIASES = ("e_score_correction_bias", "expert_bias")  # of routers; added to scores when experts are chosen


@dataclass(frozen=True)
class Rows:
    """The rows that routers see in one pass, in order, and the sequences that they belong to.

    Attributes:
        segments_N: segment of each row; -1: padding.
        members_SG: 1 where a sequence contains a segment. What several completions share is one segment or
            more of several sequences, and so counts as often as its copies would.
    """

    segments_N: Int[Tensor, " N"]
    members_SG: Float[Tensor, "S G"]

    @classmethod
    def of_mask(cls, mask_BT: Tensor) -> Rows:
        """The rows of a padded batch; its mask is 0 at padding only."""
        rows = torch.arange(len(mask_BT), device=mask_BT.device)[:, None].expand_as(mask_BT)
        segments = torch.where(mask_BT != 0, rows, -1).reshape(-1)
        return cls(segments, torch.eye(len(mask_BT), device=mask_BT.device))

    @classmethod
    def of_positions(cls, positions_BT: Tensor) -> Rows:
        """The rows of packed sequences, each of which begins at position 0."""
        segments = (positions_BT.reshape(-1) == 0).cumsum(0) - 1
        return cls(segments, torch.eye(int(segments[-1]) + 1, device=segments.device))

    @classmethod
    def of_batch(cls, batch: MicroBatch, *, packed: bool) -> Rows:
        """The rows of a micro-batch: one packed row, or its sequences one by one with their prompts."""
        device = batch.token_ids_N.device
        lengths, sequences = list[int](), list[list[int]]()
        for block in batch.blocks:
            prompt, cuts = len(lengths), list[dict[int, int]]()  # of each completion: end of a segment -> it
            lengths.append(block.prompt_length)
            for i, length in enumerate(block.completion_lengths):
                ends = sorted({length, *(n for trunk, n in block.branches if trunk == i and n)})
                cuts.append({end: len(lengths) + k for k, end in enumerate(ends)})
                lengths += [b - a for a, b in pairwise([0, *ends])]
            for i, (trunk, n) in enumerate(block.branches or [(i, 0) for i in range(len(cuts))]):
                shared = [segment for end, segment in cuts[trunk].items() if 0 < end <= n]
                sequences.append([prompt, *shared, *cuts[i].values()])
        members = torch.zeros(len(sequences), len(lengths))
        for sequence, segments in enumerate(sequences):
            members[sequence, segments] = 1.0
        if not packed:
            lengths = (members @ torch.tensor(lengths, dtype=torch.float)).long().tolist()
            members = torch.eye(len(lengths))
        members[[row.prompt is IDLE for row in batch.rows]] = 0.0
        segments = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        return cls(segments.to(device), members.to(device))

    def summed(self, values_N: Float[Tensor, " N *any"]) -> Float[Tensor, " G *any"]:
        """Sums over the rows of each segment."""
        shape = (self.members_SG.shape[1] + 1, *values_N.shape[1:])
        return values_N.new_zeros(shape).index_add(0, self.segments_N + 1, values_N)[1:]

    @property
    def tokens_S(self) -> Float[Tensor, " S"]:
        return self.members_SG @ self.summed(torch.ones_like(self.segments_N, dtype=self.members_SG.dtype))


@dataclass(frozen=True)
class Sums:
    """Sums of what all routers returned in one pass, over the rows of each segment; only counts lack a graph.

    Attributes:
        squares_LG: squares of log sum exp of the logits.
        entropy_LG: entropies of the probabilities, nats.
    """

    rows: Rows
    top_k: int
    counts_LGE: Float[Tensor, "L G E"]
    probs_LGE: Float[Tensor, "L G E"]
    squares_LG: Float[Tensor, "L G"]
    entropy_LG: Float[Tensor, "L G"]

    def load(self) -> Load:
        """The pass's share of the step's load."""
        weights_G, tokens_S = self.rows.members_SG.sum(0), self.rows.tokens_S
        found = [torch.einsum("g,lge->le", weights_G, x).detach() for x in (self.counts_LGE, self.probs_LGE)]
        ends = torch.stack([tokens_S.sum(), tokens_S.new_tensor(float((tokens_S > 0).sum()))])
        return Load(torch.cat([*found, ends.expand(len(found[0]), 2)], -1).double())


@dataclass(frozen=True)
class Load:
    """Sums over an optimizer step in one tensor, which are added up over passes and processes.

    Attributes:
        sums: for each layer [counts of E experts | probabilities | tokens | sequences].
    """

    sums: Float[Tensor, "L C"]

    @classmethod
    def nothing(cls, sites: Sequence[RouterSite]) -> Load:
        weight = next(sites[0].module.parameters())
        shape = len(sites), 2 * sites[0].num_experts + 2
        return cls(torch.zeros(shape, dtype=torch.double, device=weight.device))

    @classmethod
    def of_tokens(cls, rows: Rows, sites: Sequence[RouterSite]) -> Load:
        """Only the tokens and sequences of a pass, which need no computation."""
        sums = cls.nothing(sites).sums
        sums[:, -2], sums[:, -1] = rows.tokens_S.sum(), (rows.tokens_S > 0).sum()
        return cls(sums)

    def __add__(self, other: Load) -> Load:
        return Load(self.sums + other.sums)

    @property
    def counts_LE(self) -> Tensor:
        return self.sums[:, : (self.sums.shape[1] - 2) // 2]

    @property
    def probs_LE(self) -> Tensor:
        return self.sums[:, self.counts_LE.shape[1] : -2]

    @property
    def tokens(self) -> Tensor:
        return self.sums[0, -2].clamp(min=1)

    @property
    def sequences(self) -> Tensor:
        return self.sums[0, -1].clamp(min=1)


def switch_loss(sums: Sums, load: Load) -> Tensor:
    """E sum_i f_i P_i, 1 at balance: f of the whole step and without gradient, P this pass's share of it.

    It is equation (4) of arXiv:2101.03961 over the global batch (arXiv:2501.11873), per layer. For a single
    layer, transformers computes K times this.
    """
    f_LE = load.counts_LE / load.counts_LE.sum(-1, keepdim=True).clamp(min=1)
    p_LE = torch.einsum("g,lge->le", sums.rows.members_SG.sum(0), sums.probs_LGE) / load.tokens
    return f_LE.shape[1] * (f_LE * p_LE).sum(-1).mean()


def entropy_loss(sums: Sums, load: Load) -> Tensor:
    """E sum_i P_i log P_i, -E log E at balance, with P of the whole step.

    The form with counts, E sum f log f, has no gradient, since counts are not differentiable. With log P
    taken as a constant the gradient is still exact, since the P_i add up to 1.
    """
    mean_LE = load.probs_LE / load.tokens
    p_LE = torch.einsum("g,lge->le", sums.rows.members_SG.sum(0), sums.probs_LGE) / load.tokens
    return p_LE.shape[1] * (p_LE * mean_LE.clamp(min=1e-12).log()).sum(-1).mean()


def sequence_loss(sums: Sums, load: Load) -> Tensor:
    """Mean over sequences of sum_i f_i P_i, f_i = E / (K T) counts (arXiv:2412.19437, eq. 17 to 20)."""
    members, tokens_S = sums.rows.members_SG, sums.rows.tokens_S.clamp(min=1)
    counts, probs = (torch.einsum("sg,lge->lse", members, x) for x in (sums.counts_LGE, sums.probs_LGE))
    f_LSE = counts.shape[-1] / sums.top_k * counts / tokens_S[:, None]
    return (f_LSE * probs / tokens_S[:, None]).sum((-1, -2)).mean() / load.sequences


def z_loss(sums: Sums, load: Load) -> Tensor:
    """Mean over tokens and layers of (log sum exp of the logits)^2 (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return (sums.squares_LG @ sums.rows.members_SG.sum(0)).mean() / load.tokens


LOSSES = {"switch": switch_loss, "sequence": sequence_loss, "entropy": entropy_loss}


@dataclass
class Seen:
    """What routers returned, by router name, in the order of the calls."""

    logits: dict[str, list[Tensor]] = field(default_factory=dict)
    experts: dict[str, list[Tensor]] = field(default_factory=dict)

    def sums(self, sites: Sequence[RouterSite], rows: Rows) -> Sums:
        found = [self._of_layer(site, rows) for site in sites]
        counts, probs, squares, entropy = (torch.stack(each) for each in zip(*found, strict=True))
        return Sums(rows, sites[0].top_k, counts, probs, squares, entropy)

    def _of_layer(self, site: RouterSite, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits, experts = torch.cat(self.logits[site.name]).float(), torch.cat(self.experts[site.name])
        assert len(logits) == len(rows.segments_N), f"{site.name} saw {len(logits)} rows"
        probs = scores(site, logits).float()
        probs = probs / probs.sum(-1, keepdim=True)  # sigmoid scores do not add up to 1
        chosen = torch.zeros_like(probs).scatter_(-1, experts.long(), 1.0).detach()
        entropy = -(probs * probs.clamp(min=1e-12).log()).sum(-1)
        return tuple(map(rows.summed, (chosen, probs, logits.logsumexp(-1).square(), entropy)))  # type: ignore


@contextmanager
def seeing(sites: Sequence[RouterSite]) -> Iterator[Seen]:
    """Records what routers return inside the `with` block, by hooks: in any model, any loop, any trainer.

    Call `backward` outside the block, so that layers recomputed in the backward pass do not count twice.
    """
    seen = Seen()

    def see(site: RouterSite, output: tuple[Tensor, ...]) -> None:
        logits, _, experts = observed(site, output)
        seen.logits.setdefault(site.name, []).append(logits.reshape(-1, logits.shape[-1]))
        seen.experts.setdefault(site.name, []).append(experts.reshape(-1, experts.shape[-1]))

    with watching(list(sites), see, with_graph=torch.is_grad_enabled()):
        yield seen


def bias_of(site: RouterSite) -> Tensor | None:
    """The bias that the router adds to scores when it chooses experts, but not to their weights."""
    found = (getattr(site.module, name, None) for name in BIASES)
    return next((bias for bias in found if isinstance(bias, Tensor)), None)


def biases_of(sites: Sequence[RouterSite], rate: float) -> list[Tensor]:
    """`bias_of` of every router; raises ValueError if one has none."""
    found = [bias for site in sites if (bias := bias_of(site)) is not None]
    if len(found) < len(sites):
        raise ValueError(
            f"moe.bias_rate={rate}: routers of {sites[0].family} have no bias for choosing experts; use "
            "moe.bias_rate=0 with moe.balance=switch"
        )
    return found


@torch.no_grad()
def move_biases(sites: Sequence[RouterSite], load: Load, rate: float) -> None:
    """b_i += rate sign(mean count - count_i), minus the mean move, after a step (arXiv:2408.15664, alg. 1).

    If the mean stayed, all biases of a layer could drift together, which changes no choice.

    Raises:
        ValueError: a router has no such bias.
    """
    for bias, counts_E in zip(biases_of(sites, rate), load.counts_LE, strict=True):
        moves = rate * (counts_E.mean() - counts_E).sign()
        own, first = own_slice(bias) if isinstance(bias, DTensor) else (bias, 0)
        own.add_((moves - moves.mean())[first : first + len(own)].to(own))


class Balancer:
    """Balances a model over optimizer steps, in any loop: sums up passes, computes losses, moves biases.

    Args:
        reduce: sums a tensor over processes; every process calls it equally often.
    """

    def __init__(
        self, sites: Sequence[RouterSite], config: MoeConfig, reduce: Callable[[Tensor], Tensor]
    ) -> None:
        self.sites, self.config, self.reduce = sites, config, reduce
        if config.bias_rate:
            biases_of(sites, config.bias_rate)
        self.coefs = {"moe/balance": 0.0 if config.balance == "none" else config.balance_coef}
        self.coefs["moe/z_loss"] = config.z_loss_coef
        self._passed: Load | None = None

    @property
    def is_on(self) -> bool:
        """Whether passes have a loss."""
        return any(self.coefs.values())

    @property
    def needs_pass(self) -> bool:
        """Whether a step's sums depend on what routers choose, and not only on its tokens."""
        return self.coefs["moe/balance"] > 0 and self.config.balance != "sequence"

    def begin(self) -> None:
        """Forgets passes that were not followed by a step, such as those of the memory probe."""
        self._passed = None

    def whole(self, local: Load) -> Load:
        """The sums of a step over all processes."""
        return Load(self.reduce(local.sums))

    def share(self, seen: Seen, rows: Rows, load: Load | None) -> tuple[Tensor | None, Metrics]:
        """A training pass's share of the step's loss, and metrics; the step's load gets its choices."""
        with torch.set_grad_enabled(self.is_on and torch.is_grad_enabled()):
            sums = seen.sums(self.sites, rows)
        local, weights_G = sums.load(), rows.members_SG.sum(0)
        self._passed = local if self._passed is None else self._passed + local
        tokens = local.sums[0, -2]
        metrics = {"moe/router_entropy": ((sums.entropy_LG.detach() @ weights_G).mean(), tokens)}
        if not self.is_on or load is None:
            return None, metrics
        losses = {"moe/balance": LOSSES.get(self.config.balance), "moe/z_loss": z_loss}
        values = {name: loss(sums, load) for name, loss in losses.items() if loss and self.coefs[name]}
        # The values of a step's passes add up, and so must their counts, which add up to 1.
        metrics |= {name: (value.detach(), tokens / load.tokens) for name, value in values.items()}
        loss = torch.stack([self.coefs[name] * value for name, value in values.items()]).sum()
        return loss.float(), metrics

    def end(self, *, moves: bool = True) -> Load:
        """The load of the step's passes over all processes; moves biases by it if the weights moved."""
        load, self._passed = self.whole(self._passed or Load.nothing(self.sites)), None
        if self.config.bias_rate and moves:
            move_biases(self.sites, load, self.config.bias_rate)
        return load
