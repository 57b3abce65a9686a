"""Every causal family of transformers as a tiny random model: exact in packed rows, or in padded batches, or
refused in words; and every weight that is trained reaches the engine.

The yardstick is the plain model: eager attention, fp32, nothing random, one sequence at a time. Sequences are
longer than every window, chunk and index of these configs.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers.models.gptj import modeling_gptj

from rl.batch import MicroBatch, pack
from rl.causal import CausalPolicy
from rl.types import Completion, Continuation, Prompt, SamplingParams, VersionSpan
from rl.update import pack_rules
from rollout.transformers import TransformersEngine
from rollout.weight_sync import publish
from tests.calling import call
from tests.rl.families import ALWAYS, FAMILIES, NO_LORA, REFUSED, load, words
from tests.scoring import logprobs, relative_error

# Not packed: state runs along the row, positions are those of columns, attention takes no layout, or a
# window or an index acts on a mask alone.
ROWS = set(
    words(
        "axk2 bailing_hybrid bamba bloom blt deepseek_v32 deepseek_v4 doge dots3_note_text falcon "
        "falcon_h1 falcon_mamba glm_moe_dsa gpt_neo gpt_neox_japanese granitemoehybrid hy_v4 "
        "inkling2_loop_text inkling2_text inkling_text jamba kimi_linear lara_mini lfm2 lfm2_moe lfm3 "
        "llama4_text mamba mamba2 minimax mpt "
        "nemotron nemotron_h olmo_hybrid openai-gpt phimoe qwen3_5_moe_text qwen3_5_text qwen3_next "
        "qwen4_exp_text recurrent_gemma rwkv stablelm xglm xlstm zamba zamba2 zaya"
    )
)
if not hasattr(modeling_gptj, "ALL_ATTENTION_FUNCTIONS"):  # before transformers 5.24
    ROWS |= {"codegen", "gptj"}
LENGTH = 40  # tokens of the longest completion


def test_the_readme_counts_the_families_of_the_version_that_it_names():
    readme = Path(__file__).parents[2].joinpath("README.md").read_text()
    found = re.search(
        r"transformers (\S+)'s (\d+) causal families (\d+) step .* rows, (\d+) in padded", readme
    )
    assert found is not None
    if not transformers.__version__.startswith(f"{found[1]}."):
        pytest.skip(f"README names transformers {found[1]}")
    rest = set(FAMILIES) - ROWS - REFUSED.keys()
    assert [int(n) for n in found.groups()[1:]] == [len(FAMILIES), len(rest), len(ROWS & set(FAMILIES))]


def plain_logprobs(model, batch: MicroBatch, temperature: float) -> torch.Tensor:
    pieces = []
    for row in batch.rows:
        prompt, ids = list(row.prompt.token_ids), row.completion.token_ids
        logits = model(input_ids=torch.tensor([prompt + ids]), use_cache=False).logits[
            0, len(prompt) - 1 : -1
        ]
        logprobs = (logits.float() / temperature).log_softmax(-1)
        found = logprobs.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        pieces.append(found[torch.tensor(row.completion.loss_mask)])
    return torch.cat(pieces)


def grow_branches(completion: Completion, prompt: Prompt) -> None:
    """Makes the completion an episode of three rows, whose prompts go on from each other by 20 and 10."""
    ids = [5 + 7 * i % 90 for i in range(36)]
    for begin in (20, 30):
        made = Completion(ids[begin : begin + 6], [-4.5] * 6, [True] * 6, "stop", [VersionSpan(0, 6)])
        completion.continuations.append(Continuation((*prompt.token_ids, *ids[:begin]), made))


PARAMETERS = [pytest.param(n, marks=[] if n in ALWAYS else [pytest.mark.rotation]) for n in FAMILIES]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_family_is_exact_or_refused_in_words(name, ragged_groups, gradients, tiny_model_dir, tmp_path):
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            load(name, tmp_path, tiny_model_dir)[0].settle_attention(LENGTH + 9)
        return
    policy, config = load(name, tmp_path, tiny_model_dir)
    reason = policy.settle_attention(LENGTH + 9)
    assert (reason is None) == (name not in ROWS), reason
    groups, advantages = ragged_groups(num_groups=3, group_size=3, max_length=LENGTH)
    grow_branches(groups[0].completions[0], groups[0].prompt)
    advantages[0][0] = 1.5
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ours = gradients(policy, config, groups, advantages)
    rules = pack_rules(config, share_prompts=policy.shares_prompts)
    batches = pack(groups, advantages, rules)[0].micro_batches
    assert any(block.branches for batch in batches for block in batch.blocks) == (reason is None)
    for batch in batches:
        expected = plain_logprobs(plain, batch, 0.8)
        torch.testing.assert_close(logprobs(policy, batch), expected, rtol=1e-4, atol=2e-4)
        # At ratio 1 the loss has the gradient of -weight * advantage * log-prob.
        (-(batch.weights_L * batch.advantages_L * expected).sum()).backward()
    theirs = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert policy.scorer.padded == (name in ROWS)
    if policy.scorer.padded:
        found = [logprobs(policy, batch).detach() for batch in batches]
        policy.scorer.padded = False
        for batch, padded in zip(batches, found, strict=True):
            torch.testing.assert_close(padded, logprobs(policy, batch).detach(), rtol=1e-6, atol=1e-6)
        assert relative_error(ours, gradients(policy, config, groups, advantages)) <= 1e-6
    off = sum(float((ours.get(n, torch.zeros(())) - g).square().sum()) for n, g in theirs.items())
    assert math.sqrt(off) < 2e-4 * math.sqrt(sum(float(g.square().sum()) for g in theirs.values()))
    every_trained_weight_reaches_the_engine(policy, tmp_path)


@pytest.mark.parametrize("name", PARAMETERS)
def test_adapters_reach_the_engine_or_are_refused_by_name(name, tiny_model_dir, tmp_path):
    if name in REFUSED:
        pytest.skip("refused with and without adapters")
    lora = "model.lora={r: 4, alpha: 8}"
    if name in NO_LORA:
        with pytest.raises(ValueError, match=r"model\.lora\.target_modules"):
            load(name, tmp_path, tiny_model_dir, lora)
        return
    policy, _config = load(name, tmp_path, tiny_model_dir, lora)
    every_trained_weight_reaches_the_engine(policy, tmp_path)


def every_trained_weight_reaches_the_engine(policy: CausalPolicy, folder) -> None:
    engine = TransformersEngine(folder, policy.tokenizer, attention=policy.own_attention)
    before = engine.fingerprints()
    streamed = {n: v.clone() for n, v in policy.weights()}
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter += 0.02 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
    publish(engine, policy.weights(), version=1, tolerance=None)
    moved = {n for n, print_ in engine.fingerprints().items() if print_ != before[n]}
    assert moved == {n for n, v in policy.weights() if not torch.equal(v, streamed[n])}
    # An adapter belongs to the module before ".lora_"; nested ones adapt one tensor each.
    trained = {n.split(".lora_")[0].replace(".base_layer", "") for n, _ in policy.trainable()}
    assert not [n for n in trained if not any(m.startswith(n) for m in moved)]
    assert len(moved) >= sum("lora_B" in n or "lora_" not in n for n, _ in policy.trainable())
    prompts = [Prompt("a", "", (5, 6, 7)), Prompt("b", "", tuple(range(8, 24)))]
    sampling = SamplingParams(temperature=0.8, max_completion_length=6)
    for group in engine.generate(call(prompts, num_completions=2, sampling=sampling, seeds=[0, 1])):
        for completion in group.completions:
            ids = [*group.prompt.token_ids, *completion.token_ids]
            with torch.no_grad():
                policy.set_packed(False)
                policy.scorer.eval()
                logits = policy.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
            logprobs = (logits[len(group.prompt.token_ids) - 1 : -1].float() / 0.8).log_softmax(-1)
            expected = logprobs.gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0].tolist()
            assert completion.behavior_logprobs == pytest.approx(expected, abs=1e-3)
