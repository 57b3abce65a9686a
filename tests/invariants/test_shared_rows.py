"""Law 1 for episodes: rows that share a group's prompt, and rows of an episode that share the beginning of
their own prompts, train as rows that stand alone, token by token.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator

from rl.batch import Batch, pack
from rl.causal import CausalPolicy
from rl.config.read import load_config
from rl.references import Copy
from rl.update import pack_rules, update_policy
from tests.invariants.drawn_episodes import episodes
from tests.scoring import alone, relative_error


def table(batches: list[Batch]) -> Counter[tuple]:
    """What the loss gets of each token: all ids up to it, its episode, and its numbers."""
    found: Counter[tuple] = Counter()
    for step, batch in enumerate(batches):
        for m in batch.micro_batches:
            slots = {column: i for i, column in enumerate(m.columns_L.tolist())}
            names: dict[int, tuple[int, int]] = {}
            for (ids_T, num_prompt, start), one in zip(m.sequences(), m.rows, strict=True):
                ids = ids_T.tolist()
                for t in range(num_prompt, len(ids)):
                    if (i := slots.pop(start + t - num_prompt, None)) is None:
                        continue
                    before = int(m.predecessors_L[i])
                    assert m.positions_N[start + t - num_prompt] == t == m.positions_N[before] + 1
                    assert m.token_ids_N[before] == ids[t - 1]
                    number = int(m.sequence_ids_L[i])
                    assert names.setdefault(number, one.episode) == one.episode
                    routes = one.completion.routes
                    logprobs = m.behavior_logprobs_L
                    found[
                        step,
                        one.episode,
                        tuple(ids[: t + 1]),
                        m.advantages_L[i].item(),
                        m.weights_L[i].item(),
                        None if logprobs is None else logprobs[i].item(),
                        None
                        if routes is None
                        else tuple(routes[t - len(one.prompt.token_ids)].flatten().tolist()),
                    ] += 1
            assert not slots and sorted(names) == list(range(m.num_sequences))
            assert len(set(names.values())) == m.num_sequences
        whole = [one.episode for m in batch.micro_batches for one in {r.episode: r for r in m.rows}.values()]
        assert len(whole) == len(set(whole))
    return found


@pytest.mark.parametrize("budget", [9, 40, 10_000])
@pytest.mark.parametrize(
    "options", [{}, {"mask_truncated": True, "num_minibatches": 2}, {"skip_without_signal": False}]
)
def test_each_token_has_the_numbers_of_its_row_alone(budget, options):
    rules = replace(
        pack_rules(load_config(None, [])), **{"token_budget": budget, "skip_without_signal": True, **options}
    )
    num_shared, branches = 0, Counter[int]()
    for seed in range(30):
        kind = {"with_logprobs": seed % 3 > 0, "with_routes": seed % 2 > 0}
        given = episodes(seed, **kind)
        shared, single = (
            pack(*given, replace(rules, share_prompts=share, token_budget=budget)) for share in (True, False)
        )
        assert table(shared) == table(single), seed
        for a, b in zip(shared, single, strict=True):
            assert (a.num_sequences, a.num_loss_tokens) == (b.num_sequences, b.num_loss_tokens)
            assert sum(len(m.rows) for m in a.micro_batches) == sum(len(m.rows) for m in b.micro_batches)
            for m in a.micro_batches:
                assert len(m.token_ids_N) <= budget or m.num_sequences == 1
            num_shared += sum(
                len({r.part for r in m.rows}) > 1 and len(m.blocks) < len(m.rows) for m in a.micro_batches
            )
            for block in (block for m in a.micro_batches for block in m.blocks):
                branches.update(len(shared) for shared, _ in block.columns)
        assert repr(given) == repr(episodes(seed, **kind))  # nothing is written to
    assert num_shared > 10
    assert sum(number for length, number in branches.items() if length) > 10


@pytest.mark.parametrize("loss", ["grpo", "gspo", "dapo"])
def test_gradients_and_metrics_are_those_of_rows_alone(tiny_model_dir, loss):
    overrides = [f"model.name={tiny_model_dir}", "model.dtype=fp32", "loss.clip_high=4.0", "loss.kl_coef=0.1"]
    overrides += [f"loss.name={loss}", "train.num_minibatches=2", "train.num_epochs=2"]
    overrides += ["loss.sampler_correction={level: sequence}"]
    config = load_config(None, overrides)
    policy = CausalPolicy(config.model, Accelerator(cpu=True), temperature=0.9)
    assert policy.settle_attention() is None
    reference = Copy(policy, moves=False)
    with torch.no_grad():
        for parameter in reference.scorer.parameters():
            parameter.mul_(1.02)
    for seed in (6, 12):
        found, branches = [], []
        for packed, budget in ((False, 10_000), (True, 10_000), (True, 30)):
            policy.set_packed(packed)
            rules = replace(pack_rules(config, share_prompts=packed), token_budget=budget)
            grads: dict[str, torch.Tensor] = {}

            class Summing(torch.optim.SGD):
                def step(self, closure=None, grads=grads):  # type: ignore[override]
                    for name, p in policy.trainable():
                        grads[name] = grads.get(name, 0) + p.grad

            batches = pack(*episodes(seed), rules)
            branches += [b.branches for batch in batches for m in batch.micro_batches for b in m.blocks]
            result = update_policy(
                policy,
                Summing([p for _, p in policy.trainable()], lr=0.0),
                batches,
                config.loss,
                world=alone(policy),
                reference=reference,
                num_epochs=2,
                max_grad_norm=1e9,
            )
            assert result.num_updates == 4
            found.append((grads, {k: v for k, v in result.metrics.items() if k != "memory/peak"}))
        assert any(branches)
        (expected, metrics), *others = found
        for grads, values in others:
            assert relative_error(grads, expected) <= 1e-5
            assert values == pytest.approx(metrics, rel=2e-4, abs=1e-6)
