"""A mixture-of-experts policy: a causal policy whose routers are replayed, balanced, trained or frozen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from rl.batch import IDLE, Batch
from rl.causal import CausalPolicy
from rl.config.moe import MoeConfig
from rl.moe.balance import Balancer, Load, Rows, bias_of, seeing
from rl.moe.esft import mask_split_gradients
from rl.moe.health import Health, routes_of
from rl.moe.replay import MISSING, Replay, packed_routes, recorder
from rl.moe.routers import RouterSite, UnknownRouter, find_routers, self_check
from rl.policy import Prepared, Scores
from rl.store.metrics import Metric

MAX_LAYERS = 256
FLIPS = "replayed tokens whose router chose other experts in training than in sampling"
METRICS = tuple(
    Metric(f"moe/flip_rate/layer_{i}", "share", f"{FLIPS}, decoder layer {i}") for i in range(MAX_LAYERS)
)


@dataclass(frozen=True)
class Drawn:
    """What a micro-batch is scored with.

    Attributes:
        routes_NSK: experts of each packed column to replay; None: nothing is replayed.
        rows: the rows that routers see in its passes.
        load: sums of the whole step, for the balance loss; None: there is no such loss.
    """

    routes_NSK: Int[Tensor, "N S K"] | None
    rows: Rows
    load: Load | None = None


class MoePolicy:
    """`rl.policy.Policy` around a causal policy, which answers for everything not defined here.

    Attributes:
        replays: whether the routes that completions carry are replayed.
    """

    def __init__(self, inner: CausalPolicy, sites: list[RouterSite], config: MoeConfig) -> None:
        self.inner, self.sites = inner, sites
        self.replays, self._without = config.replay != "none", ""
        partial = inner.peft_model is not None or config.trained_experts is not None
        self.trains_router, self.config = settle_routers(inner.model, sites, config, partial=partial)
        self.replay = Replay(inner.model, sites)
        self.balancer = Balancer(sites, config, lambda x: cast(Tensor, inner.accelerator.reduce(x, "sum")))
        self.health = Health(None, top_k=sites[0].top_k, num_steps=1)
        self._load: Load | None = None
        if not inner.unread:
            self._check_routers()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def split(self, split: Callable[[CausalPolicy], Any]) -> MoePolicy:
        """Splits the weights over processes: `split` makes the policy that replaces `inner`."""
        self.inner = split(self.inner)
        self._check_routers()
        return self

    def _check_routers(self) -> None:
        try:
            self._on_canary(self_check)
        except UnknownRouter as error:
            self.can_replay(str(error))

    def _on_canary(self, watch: Callable[..., Any]) -> Any:
        """`watch(compute, sites, ids)` on the ids of the canary, by the model's own attention."""
        ids = torch.tensor([self.inner.canary_ids], device=self.device)
        self.inner.scorer.eval()
        try:
            with self.inner.in_rows(), self.inner.autocast():
                return watch(lambda ids_1T: self.inner.scorer.own_logprobs(ids_1T[0]), self.sites, ids)
        finally:
            self.inner.scorer.train()

    def recorder(self, model: Any) -> Any:
        """The recorder for an in-process engine's copy of the model (`rl.moe.replay.recorder`)."""
        return recorder(model, find_routers(model))

    def can_replay(self, fault: str | None) -> bool:
        """Whether routes can be replayed, which is so without a `fault`; turns replay off otherwise.

        Raises:
            ValueError: there is a fault, but the config asks for replay.
        """
        if fault is None:
            return True
        if self.config.replay == "engine":
            raise ValueError(
                f"moe.replay=engine: {fault}; use moe.replay=none, or engine.name=transformers where it is "
                "fast enough"
            )
        self.replays, self._without = False, f" ({fault})"
        return False

    def said(self) -> Iterator[str]:
        """Sentences on what the run does with its routers, and a warning if that is unwise."""
        router, replay = "trained" if self.trains_router else "frozen", "on" if self.replays else "off"
        balance = "off" if self.config.balance == "none" else self.config.balance
        balance += "" if self.trains_router else " (a frozen router has none)"
        yield f"mixture of experts: router {router}, replay {replay}{self._without}, balance {balance}"
        if self.trains_router and not self.replays and self.config.balance == "none":
            yield (
                "warning: the router is trained without replay and without a balance loss: experts of "
                "sampling and of training drift apart, and some may get no tokens; use moe.replay=engine "
                "where the engine returns routes, moe.balance=switch, or moe.router=freeze"
            )

    def prepare(self, batch: Batch, *, draw: int) -> list[Prepared]:
        self.balancer.begin()
        found = [replace(p, drawn=self._drawn(p)) for p in self.inner.prepare(batch, draw=draw)]
        if not self.balancer.is_on:
            return found
        load = self._whole_load(found)
        return [replace(p, drawn=replace(p.drawn, load=load)) for p in found]

    def _drawn(self, prepared: Prepared) -> Drawn:
        batch, scorer = prepared.batch, self.inner.scorer
        rows = Rows.of_batch(batch, packed=scorer.packed)
        if scorer.pads(batch):
            rows = replace(rows, segments_N=batch.layout.padded(rows.segments_N, -1))
        return Drawn(packed_routes(batch, self.sites) if self.replays else None, rows)

    @torch.no_grad()
    def _whole_load(self, found: list[Prepared]) -> Load:
        """The sums of a batch over all processes, by the weights before the step's first update.

        A pass without a graph finds what routers choose besides replayed routes. These do not cover prompts,
        the last token of a completion, and tokens that older policies sampled.
        """
        local = Load.nothing(self.sites)
        for prepared in found:
            if not self.balancer.needs_pass:
                local += Load.of_tokens(prepared.drawn.rows, self.sites)
                continue
            with self._replayed(prepared), self.inner.autocast(), seeing(self.sites) as seen:
                self.inner.scorer.run(prepared.batch)
            local += seen.sums(self.sites, prepared.drawn.rows).load()
        return self.balancer.whole(local)

    @contextmanager
    def _replayed(self, prepared: Prepared, *, keeps: bool = False) -> Iterator[None]:
        """Installs the micro-batch's routes inside the block, and with `keeps` also after it."""
        self.replay.remove()
        with ExitStack() as stack:
            if prepared.drawn.routes_NSK is not None:
                self.replay.install(self._by_forward(prepared, prepared.drawn.routes_NSK))
                stack.callback(self.replay.remove)
            yield
            if keeps:
                stack.pop_all()

    def score(self, prepared: Prepared, *, ids_LK: Int[Tensor, "L K"] | None = None) -> Scores:
        """Scores with replayed routes; if there is a graph, they stay installed until `backward` is over."""
        drawn, metrics, extra = prepared.drawn, {}, None
        with self._replayed(prepared, keeps=torch.is_grad_enabled()):
            with seeing(self.sites) as seen:
                scores = self.inner.score(prepared, ids_LK=ids_LK)
            rows = [row for row in prepared.batch.rows if row.prompt is not IDLE]
            num_tokens = sum(len(row.completion.token_ids) - row.num_context for row in rows)
            if drawn.routes_NSK is not None:
                metrics = self.replay.metrics(num_tokens)
            elif self.replays:
                total = torch.tensor(float(num_tokens * len(self.sites)), device=self.device)
                metrics = {"moe/replayed": (torch.zeros_like(total), total)}
        if torch.is_grad_enabled():
            extra, of_routers = self.balancer.share(seen, drawn.rows, drawn.load)
            metrics |= of_routers
        return replace(scores, extra_loss=extra, metrics={**scores.metrics, **metrics})

    def _by_forward(self, prepared: Prepared, routes_NSK: Tensor) -> list[Tensor]:
        """Routes of each forward pass: of the packed row, of padded rows, or of sequences one by one."""
        if self.inner.scorer.packed:
            return [routes_NSK]
        if self.inner.scorer.pads(prepared.batch):
            return [prepared.batch.layout.padded(routes_NSK, MISSING)]
        rows = ((routes_NSK[at : at + len(ids) - n], n) for ids, n, at in prepared.batch.sequences())
        return [nn.functional.pad(own, (0, 0, 0, 0, n, 0), value=MISSING) for own, n in rows]

    def score_by(self, scorer: nn.Module, prepared: Prepared, *, ids_LK: Tensor | None = None) -> Scores:
        """Scores a reference without replay: other weights choose other experts."""
        assert not self.replay.is_installed, "a reference is scored while routes are installed"
        return self.inner.score_by(scorer, prepared, ids_LK=ids_LK)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        try:
            self.inner.backward(loss, last=last)
        finally:
            self.replay.remove()

    def finish_gradients(self, max_norm: float) -> float:
        mask_split_gradients(self.model)
        norm = self.inner.finish_gradients(max_norm)
        load = self.balancer.end(moves=math.isfinite(norm))
        self._load = load if self._load is None else self._load + load
        return norm

    def step_metrics(self) -> dict[str, float]:
        load, self._load = self._load or self.balancer.end(moves=False), None
        return self.health.step(load, self._on_canary(routes_of))


def settle_routers(
    model: nn.Module, sites: list[RouterSite], config: MoeConfig, *, partial: bool
) -> tuple[bool, MoeConfig]:
    """Freezes routers and their adapters if the config says so; returns whether they are trained.

    It also returns the resulting config: frozen routers have no losses, which would train other weights to
    change what a router chooses.

    Args:
        partial: whether only some weights are trained.

    Raises:
        ValueError: the config asks to train them, but they cannot be trained.
    """
    trains = config.router == "train" or (config.router == "auto" and not partial)
    names = tuple(f"{site.name.removesuffix('.base_layer')}." for site in sites)
    of_routers = [p for n, p in model.named_parameters() if n.startswith(names)]
    biases = [bias for site in sites if (bias := bias_of(site)) is not None]  # they have no gradient
    for parameter in biases if trains else [*of_routers, *biases]:
        parameter.requires_grad_(False)
    trained = any(p.requires_grad for p in of_routers)
    if config.router == "train" and not trained:
        raise ValueError(
            "moe.router=train: neither adapters nor chosen experts train a router here; use moe.router=auto, "
            "or train all weights"
        )
    return trained, config if trained else config.model_copy(update={"balance": "none", "z_loss_coef": 0.0})


def with_experts(
    inner: CausalPolicy, config: MoeConfig, note: Callable[[str], None]
) -> CausalPolicy | MoePolicy:
    """The policy itself if its model has no routers, else a `MoePolicy` around it.

    Raises:
        ValueError: the config asks for what this model cannot have.
    """
    asked = config.model_dump(exclude_defaults=True)
    try:
        sites = find_routers(inner.model)
    except UnknownRouter as error:
        if asked.keys() - {"experts_implementation"}:
            raise
        note(f"warning: {error}; its experts are trained as they are")
        return inner
    if not sites and asked:
        raise ValueError(
            f"moe: {', '.join(asked)} are set, but {inner.config.name} has no routers; remove the section moe"
        )
    return MoePolicy(inner, sites, config) if sites else inner
