"""Padded batches have the gradients of single sequences, whatever else is on."""

from __future__ import annotations

import pytest
import torch

from rl.batch import pack
from rl.references import make_reference
from rl.update import pack_rules
from tests.invariants.drawn_episodes import episodes
from tests.rl.families import load
from tests.scoring import prepared, relative_error

KL, LORA, CHECKPOINTING = "loss.kl_coef=0.1", "model.lora={r: 4}", "model.gradient_checkpointing=true"
ENTROPY, LOGITS, WEIGHED = "loss.entropy_coef=0.05", "model.keep_logits=true", "loss.name=gspo"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lfm2", [KL, LORA, CHECKPOINTING, ENTROPY]),
        ("falcon_h1", [KL, CHECKPOINTING, LOGITS]),
        ("mamba2", [LOGITS, ENTROPY, WEIGHED]),
        pytest.param("qwen3_next", [KL, LORA, CHECKPOINTING, LOGITS, WEIGHED], marks=pytest.mark.rotation),
    ],
)
def test_gradients_are_those_of_one_sequence_at_a_time(name, options, tiny_model_dir, tmp_path, gradients):
    policy, config = load(name, tmp_path, tiny_model_dir, "train.token_budget=90", *options)
    assert policy.settle_attention(60) is not None and policy.scorer.padded
    references = [make_reference(policy, moves=False) if KL in options else None for _ in range(2)]
    generator, found = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    for padded, reference in zip((True, False), references, strict=True):
        for scorer in (policy.scorer, getattr(reference, "scorer", policy.scorer)):
            scorer.padded = padded
        found.append(gradients(policy, config, *episodes(12), reference=reference))
    assert relative_error(*found) <= 1e-5  # law 1


def test_entropies_and_log_probs_of_asked_ids_are_those_of_one_sequence_at_a_time(tiny_model_dir, tmp_path):
    policy, config = load("falcon_h1", tmp_path, tiny_model_dir, "train.token_budget=90")
    policy.settle_attention(60)
    (batch,) = pack(*episodes(12), pack_rules(config, share_prompts=False))
    assert max(len(m.rows) for m in batch.micro_batches) > 3
    for micro_batch in batch.micro_batches:
        ids_LK = torch.randint(0, 100, (len(micro_batch.columns_L), 4))
        both = []
        for padded in (True, False):
            policy.scorer.padded = padded
            scores = policy.score(prepared(policy, micro_batch), ids_LK=ids_LK)
            both.append([scores.logprobs_L, scores.entropy_L, scores.logprobs_LK, scores.rest_L])
        for ours, theirs in zip(*both, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
