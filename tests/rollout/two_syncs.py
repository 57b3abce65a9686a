"""One rank of two: `python two_syncs.py MODEL_DIR OUT`; writes how each weight sync ended here."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tiny_llama import Stream, make_model, make_tokenizer

from rl.world import World
from rollout.transformers import TransformersEngine
from rollout.weight_sync import WeightSyncError, publish


class BreakingEngine(TransformersEngine):
    """Fails at the tensor of number `breaks_at`, counted from 1; at none where that is 0."""

    breaks_at = 0

    def update_weights(self, weights, *, version):
        def until_it_breaks():
            for number, pair in enumerate(weights, 1):
                if number == self.breaks_at:
                    raise RuntimeError("no memory is left")
                yield pair

        super().update_weights(until_it_breaks(), version=version)


class CollectiveStream(Stream):
    """Each tensor is gathered from both processes, as a sharded policy does it.

    `shift` is added to the canary's log-probs.
    """

    def __init__(self, model, passes, shift) -> None:
        super().__init__(model, passes)
        self.shift = shift

    def __iter__(self):
        for name, tensor in super().__iter__():
            whole = tensor.clone()
            torch.distributed.all_reduce(whole)
            yield name, whole / 2

    def canary(self):
        torch.distributed.barrier()
        ids, logprobs = super().canary()
        return ids, [logprob + self.shift for logprob in logprobs]


def main(model_dir: str, out: str) -> None:
    world = World(Accelerator(cpu=True))
    found = {}
    for case, breaks_at, sends, shift in [
        ("both_send", 0, True, 0.0),
        ("one_sends", 0, world.rank == 0, 0.0),
        ("one_sends_and_the_other_has_another_server", 0, world.rank == 0, 0.0),
        ("first_breaks_off", 7 if world.rank == 0 else 0, True, 0.0),
        ("only_sender_breaks_off", 7, world.rank == 0, 0.0),
        ("second_computes_otherwise", 0, True, 1.0 if world.rank == 1 else 0.0),
        ("second_computes_otherwise_later", 0, True, 1.0 if world.rank == 1 else 0.0),
        ("not_finite_on_the_second", 0, True, 0.0),
    ]:
        engine, policy = BreakingEngine(model_dir, make_tokenizer()), make_model(1)
        engine.breaks_at = breaks_at
        changes = {}
        if case.startswith("not_finite") and world.rank == 1:
            changes = {1: lambda tensors: tensors | {"model.norm.weight": torch.full((64,), torch.inf)}}
        stream = CollectiveStream(policy, changes, shift)
        if not sends and not case.endswith("another_server"):  # it uses what the other one has sent to
            TransformersEngine.update_weights(engine, iter(Stream(policy)), version=0)
        before, began, error = engine.fingerprints(), time.monotonic(), ""
        try:
            later = case.endswith("later")
            how = {"team": world, "sends": sends, "tolerance": 1e-3, "canary_waits": later}
            report = publish(engine, stream, version=5, **how)
            if later:
                assert report.verdict is not None
                report.verdict()
        except WeightSyncError as fault:
            error = str(fault)
        found[case] = {
            "error": error,
            "seconds": time.monotonic() - began,
            "version": engine.version,
            "is_unchanged": engine.fingerprints() == before,
            "passes": stream.count,
        }
    Path(out, f"rank{world.rank}.json").write_text(json.dumps(found))
    world.end()


if __name__ == "__main__":
    main(*sys.argv[1:])
