"""TRL's SFTTrainer with a balance loss for mixtures of experts, exact over the whole optimizer step."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from trl import SFTTrainer

from recipes.kinds import settle_experts
from rl.config.sft import SftConfig
from rl.model.exactness import backbone
from rl.moe.adapters import check_trained
from rl.moe.balance import Balancer, Load, Rows, seeing
from rl.moe.health import Health, routes_of
from rl.moe.policy import settle_routers
from rl.moe.routers import find_routers
from rl.optimizer import lost_to_rounding
from rl.world import World

SEEN = ("input_ids", "attention_mask", "position_ids")


class BalancedTrainer(SFTTrainer):
    """TRL's trainer with the losses of `rl.moe.balance`; for a dense model it is TRL's unchanged.

    Attributes:
        health: watches the routing; its metrics are logged with TRL's own.
    """

    def balance(self, config: SftConfig, probe: Tensor) -> None:
        """Call it before `train`. If a step has several passes, passes without a graph count its load."""
        model = cast(Any, self.accelerator.unwrap_model(self.model))
        self.plain = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.sites, self.probe = find_routers(self.plain), probe.to(self.plain.device)
        self.balancer: Balancer | None = None
        self.step_load: Load | None = None
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}
        named = [(name, p) for name, p in self.plain.named_parameters() if p.requires_grad]
        self.said = [f"warning: {lost}"] if (lost := lost_to_rounding(named, config.optimizer.lr)) else []
        if not self.sites:
            if asked := config.moe.model_dump(exclude_defaults=True):
                raise ValueError(
                    f"moe: {', '.join(asked)} are set, but {config.model.name} has no routers; remove the "
                    "section moe"
                )
            return
        note = self.said.append
        settle_experts(
            self.plain,
            config.moe,
            run_dir=config.run_dir,
            world=World(self.accelerator),
            autocast=lambda: self.accelerator.autocast(),
            note=note,
        )
        lora = config.model.lora
        trained, moe = settle_routers(self.plain, self.sites, config.moe, partial=lora is not None)
        if not trained:
            self.said.append("routers are frozen, so there is no balance loss")
        note(check_trained(self.plain, lora))
        self.balancer = Balancer(self.sites, moe, self.reduced)
        folder = config.run_dir if self.is_world_process_zero() else None
        self.health = Health(folder, top_k=self.sites[0].top_k, num_steps=config.train.steps)

    def reduced(self, values: Tensor) -> Tensor:
        return cast(Tensor, self.accelerator.reduce(values, "sum"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Loads adapters only, since a whole model was loaded from there before. transformers' trainer goes
        by names on disk: experts and routers under other names would stay as they were, with a warning.
        """
        if hasattr(self.accelerator.unwrap_model(self.model), "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        found = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_load = None
        if self.balancer is not None and self.balancer.is_on and num_batches > 1:
            self.step_load = self.counted(found[0])
        return found

    @torch.no_grad()
    def counted(self, batches: list[Any]) -> Load:
        assert self.balancer is not None
        local = Load.nothing(self.sites)
        for batch in batches:
            inputs: Any = self._prepare_inputs({k: v for k, v in batch.items() if k in SEEN})
            if not self.balancer.needs_pass:
                local += Load.of_tokens(rows_of(inputs), self.sites)
                continue
            with self.compute_loss_context_manager(), self.accelerator.autocast(), seeing(self.sites) as seen:
                backbone(self.plain)(**inputs, use_cache=False)
            local += seen.sums(self.sites, rows_of(inputs)).load()
        return self.balancer.whole(local)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.balancer is None or not self.plain.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with seeing(self.sites) as seen:
            loss: Any = super().compute_loss(model, inputs, False, num_items_in_batch)
        rows, load = rows_of(inputs), self.step_load
        if load is None and self.balancer.is_on:  # the step's only pass
            with torch.no_grad():
                load = self.balancer.whole(seen.sums(self.sites, rows).load())
        extra, metrics = self.balancer.share(seen, rows, load)
        for name, pair in metrics.items():
            before = self.sums.get(name, (0, 0))
            self.sums[name] = (before[0] + pair[0], before[1] + pair[1])
        # Gradients are averaged over processes, and the loss divided by the number of passes if it is a mean.
        scale = self.accelerator.num_processes * self.divisor(num_items_in_batch)
        return loss if extra is None else loss + extra * scale

    def divisor(self, num_items_in_batch: Any) -> int:
        is_whole = getattr(self, "loss_is_scaled_for_ga", None)
        if is_whole is None:
            is_whole = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return 1 if is_whole else self.current_gradient_accumulation_steps

    def training_step(self, *given: Any, **named: Any) -> Tensor:
        loss = super().training_step(*given, **named)
        if self.balancer is not None and self.accelerator.sync_gradients:
            pairs = self.reduced(
                torch.stack([torch.stack([x.double() for x in p]) for p in self.sums.values()])
            )
            values = {name: (s / c).item() for name, (s, c) in zip(self.sums, pairs, strict=True)}
            self.plain.eval()
            with self.accelerator.autocast():
                routes = routes_of(partial(self.plain, use_cache=False), self.sites, self.probe[None])
            self.plain.train()
            values |= self.health.step(self.balancer.end(), routes)
            self.health.write(self.state.global_step + 1)
            self.sums = {}
            for name, value in values.items():
                self._metrics["train"][name].append(value)
        return loss


def rows_of(inputs: Any) -> Rows:
    """The rows of a batch; TRL packs without a mask and pads with one."""
    mask = inputs.get("attention_mask")
    return Rows.of_positions(inputs["position_ids"]) if mask is None else Rows.of_mask(mask)
