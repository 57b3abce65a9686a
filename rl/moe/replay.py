"""Routing replay (R3, arXiv:2510.11370): training computes with the experts that sampling computed with.

A completion carries its routes as integers of [tokens, decoder layers, K]. Tokens whose routes are `MISSING`
are routed live. So are prompts always, since a column that completions share can have only one route. Only
the choice is replayed: weights come from the live scores of all experts, so a router has its gradient. N
packed columns, T tokens of a forward pass, S routers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from rl.batch import MicroBatch, Row
from rl.model.exactness import backbone
from rl.moe.routers import Output, RouterSite, answered, observed, route_weights, watching

MISSING = -1
Metrics = dict[str, tuple[Tensor, Tensor]]


def packed_routes(batch: MicroBatch, sites: Sequence[RouterSite]) -> Int[Tensor, "N S K"] | None:
    """Routes of every column of a micro-batch; None if no column can be replayed.

    Raises:
        ValueError: routes do not fit the shape of their completion and model, or name an unknown expert.
    """
    if all(row.completion.routes is None for row in batch.rows):
        return None
    layers, top_k = [site.layer for site in sites], sites[0].top_k
    routes = np.full((len(batch.token_ids_N), len(sites), top_k), MISSING, dtype=np.int16)
    owns = [own for block in batch.blocks for _, own in block.columns]
    for row, own in zip(batch.rows, owns, strict=True):
        if row.completion.routes is not None:
            found = _checked(row, sites)[:, layers]
            routes[own.start : own.stop] = found[len(found) - len(own) :]  # what it shares is live
    ordered = np.sort(routes, axis=-1)
    # An engine that computed nothing for a token leaves zeros: no router chooses an expert twice.
    unknown = (ordered[..., 0] < 0) | (ordered[..., 1:] == ordered[..., :-1]).any(-1)
    routes[unknown] = MISSING
    return None if unknown.all() else torch.from_numpy(routes).to(batch.token_ids_N.device)


def _checked(row: Row, sites: Sequence[RouterSite]) -> np.ndarray:
    found, ids = np.asarray(row.completion.routes), row.completion.token_ids
    last, most = sites[-1].layer, min(site.num_experts for site in sites)
    is_right = found.ndim == 3 and found.shape[0] == len(ids) and found.shape[2] == sites[0].top_k
    if not (is_right and found.shape[1] > last and found.dtype.kind in "iu"):
        raise ValueError(
            f"routes of a completion of prompt {row.prompt.id} have shape {found.shape}, but its {len(ids)} "
            f"tokens and this model need integers of ({len(ids)}, {last + 1} or more layers, "
            f"{sites[0].top_k}); the engine serves another model, or use moe.replay=none"
        )
    if found.size and found[:, [site.layer for site in sites]].max() >= most:
        raise ValueError(
            f"routes of a completion of prompt {row.prompt.id} name expert {found.max()}, but the model has "
            f"{most}; perhaps the engine counts copies of experts: turn that off, or use moe.replay=none"
        )
    return found


class Replay:
    """Replaces the experts that routers choose, in a forward pass and when parts of it are recomputed.

    Attributes:
        flips_S, tokens_S: for each router, replayed tokens whose live experts differ, and replayed tokens.
    """

    def __init__(self, model: Any, sites: Sequence[RouterSite]) -> None:
        self.model, self.sites = model, list(sites)
        self.index = {site.name: i for i, site in enumerate(sites)}
        self._installed: ExitStack | None = None
        self._forward = self._next = 0
        self._recomputes = False
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
                self._bind(layer)

    def _bind(self, layer: Any) -> None:
        """Gives a recomputed layer the routes of the forward pass that it belongs to, in any order."""
        checkpoint = layer._gradient_checkpointing_func

        def bound(compute: Any, *arguments: Any) -> Any:
            forward, num_calls = self._forward, 0

            def again(*given: Any) -> Any:
                nonlocal num_calls
                before = self._forward, self._recomputes
                self._forward, self._recomputes = forward, num_calls > 0
                num_calls += 1
                try:
                    return compute(*given)
                finally:
                    self._forward, self._recomputes = before

            return checkpoint(again, *arguments)

        layer._gradient_checkpointing_func = bound

    @property
    def is_installed(self) -> bool:
        return self._installed is not None

    def install(self, routes: Sequence[Int[Tensor, "_ S K"]]) -> None:
        """Replays the next forward passes, one for each entry, until `remove`."""
        assert not self.is_installed, "routes of another micro-batch are still installed"
        self._installed = ExitStack()
        self._installed.enter_context(self._replaying(routes))

    def remove(self) -> None:
        if self._installed is not None:
            self._installed.close()
            self._installed = None

    @contextmanager
    def _replaying(self, routes: Sequence[Int[Tensor, "_ S K"]]) -> Iterator[None]:
        self._next = 0
        self.flips_S = routes[0].new_zeros(len(self.sites), dtype=torch.float)
        self.tokens_S = torch.zeros_like(self.flips_S)

        def see(site: RouterSite, output: Output) -> Output:
            logits, weights, live = observed(site, output)
            given = routes[self._forward][:, self.index[site.name]].to(live.dtype)
            assert given.shape == live.shape, f"{site.name} saw {len(live)} tokens, not {len(given)}"
            is_given_T = given[:, 0] != MISSING
            chosen = torch.where(is_given_T[:, None], given, live)
            if not self._recomputes:
                is_other_T = (live.sort(-1).values != chosen.sort(-1).values).any(-1)
                self.flips_S[self.index[site.name]] += is_other_T.sum()
                self.tokens_S[self.index[site.name]] += is_given_T.sum()
            return answered(output, route_weights(site, logits, chosen, weights.dtype), chosen)

        def begin(_module: Any, _arguments: Any) -> None:
            self._forward = self._next
            self._next += 1

        handle = backbone(self.model).register_forward_pre_hook(begin)
        try:
            with watching(self.sites, see, with_graph=torch.is_grad_enabled()):
                yield
        finally:
            handle.remove()

    def metrics(self, num_tokens: int) -> Metrics:
        """Metrics of the passes since `install`, in which `num_tokens` of completions were computed."""
        total = self.tokens_S.new_tensor(float(num_tokens * len(self.sites)))
        found: Metrics = {
            "moe/flip_rate": (self.flips_S.sum(), self.tokens_S.sum()),
            "moe/replayed": (self.tokens_S.sum(), total),
        }
        each = zip(self.sites, self.flips_S, self.tokens_S, strict=True)
        return found | {f"moe/flip_rate/layer_{site.layer}": (flips, n) for site, flips, n in each}


def recorder(model: Any, sites: Sequence[RouterSite]) -> Callable[[int], AbstractContextManager[list[Any]]]:
    """A recorder of routes for an engine in this process: `with record(num_rows) as found` around `generate`.

    Afterwards `found` holds an array [rows, forward passes, decoder layers, K]: the experts of the last token
    of each row in each pass. Dense layers are `MISSING`.
    """
    num_layers = max(model.config.get_text_config().num_hidden_layers, sites[-1].layer + 1)

    @contextmanager
    def record(num_rows: int) -> Iterator[list[Any]]:
        found: list[Any] = []
        seen: dict[int, list[Tensor]] = {site.layer: [] for site in sites}

        def see(site: RouterSite, output: Output) -> None:
            experts = observed(site, output)[2]
            seen[site.layer].append(experts.view(num_rows, -1, experts.shape[-1])[:, -1])

        with watching(sites, see):
            yield found
        shape = (num_rows, len(seen[sites[0].layer]), num_layers, sites[0].top_k)
        routes = np.full(shape, MISSING, dtype=np.int16)
        for layer, experts in seen.items():
            routes[:, :, layer] = torch.stack(experts, 1).cpu().numpy()
        found.append(routes)

    return record
