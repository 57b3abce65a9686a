"""Nothing random is active while log-probs are computed, attention honours the config, and lengths at which a
model changes are seen.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from accelerate import Accelerator

from rl.advantages import compute_advantages
from rl.batch import PackRules, micro_batch_of, pack
from rl.causal import CausalPolicy
from rl.config.read import load_config
from rl.model.exactness import moving_rope
from rl.model.loading import num_ids
from rl.packed_check import plain_logprobs, probe_batch
from rl.references import make_reference
from rl.types import Completion, Group, Prompt, Reward, SamplingParams, ScoredGroup, VersionSpan
from rl.update import pack_rules, update_policy
from rollout.transformers import TransformersEngine
from tests.calling import call
from tests.rl.families import save_tiny, tiny_config
from tests.scoring import alone, logprobs, prepared

SHORT, LONG = [1.0, 1.0, 1.1, 1.2], [1.1, 1.5, 3.0, 4.0]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": SHORT,
    "long_factor": LONG,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture
def family(tiny_model_dir, tmp_path):
    """A folder with a tiny model of a family and changes to its config."""

    def make(name: str, **changes):
        save_tiny(name, tmp_path, tiny_config(name, **changes))
        transformers.AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
        return tmp_path

    return make


def load(folder, *overrides: str) -> tuple[CausalPolicy, object]:
    config = load_config(None, [f"model.name={folder}", "model.dtype=fp32", *overrides])
    return CausalPolicy(config.model, Accelerator(cpu=True), temperature=1.0), config


def eager(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def whole(model, ids: list[int]) -> list[float]:
    logprobs = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def sure(folder):
    """The model of a folder with larger logits, which round more."""
    model = eager(folder)
    with torch.no_grad():
        next(
            p
            for name, p in model.named_parameters()
            if name.endswith(("model.norm.weight", "embedding_norm.weight"))
        ).mul_(1e4)
    model.save_pretrained(folder)
    return folder


def row_of(lengths: list[int]):
    """One prompt of 10 tokens and completions of these lengths, in one micro-batch."""
    draw = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(5, 100, (n,), generator=draw).tolist()  # noqa: E731
    completions = [Completion(ids(n), [], [True] * n, "stop", [VersionSpan(0, n)]) for n in lengths]
    group = ScoredGroup(Group(Prompt("p", "", tuple(ids(10))), completions), [Reward(0.0)] * len(lengths))
    rules = PackRules(1 << 20, row_weight=lambda *_: 1.0, skip_without_signal=False)
    return pack([group], [[1.0] * len(lengths)], rules)[0].micro_batches[0]


def far_from(model, policy, batch) -> float:
    """Nats between the policy's log-probs of a row and those of the plain model, one sequence at a time."""
    expected = []
    for row in batch.rows:
        prompt = list(row.prompt.token_ids)
        found = whole(model, [*prompt, *row.completion.token_ids])[len(prompt) - 1 :]
        expected += [x for x, counts in zip(found, row.completion.loss_mask, strict=True) if counts]
    with torch.no_grad():
        return float((logprobs(policy, batch) - torch.tensor(expected)).abs().max())


@pytest.mark.parametrize("name", ["gemma2", "vaultgemma"])
def test_a_soft_cap_is_honoured_by_rows_packed_rows_canary_and_engine(family, name):
    """transformers' own choice, sdpa, leaves it out: 0.09 nats with a cap of 2."""
    folder = family(name, attn_logit_softcapping=2.0)
    policy, _ = load(folder)
    assert policy.own_attention == "eager"  # by what sdpa would drop; in bf16 no comparison would show it
    assert policy.settle_attention() is None
    plain, batch = eager(folder), probe_batch(policy.model)
    assert far_from(plain, policy, batch) < 1e-5
    policy.set_packed(False)
    assert far_from(plain, policy, batch) < 1e-5
    ids, canary = policy.weights().canary()
    assert canary == pytest.approx(whole(plain, ids), abs=1e-5)
    for engine in (
        TransformersEngine(folder, policy.tokenizer),
        TransformersEngine(folder, policy.tokenizer, attention=policy.own_attention),
    ):
        assert engine.prompt_logprobs(ids) == pytest.approx(canary, abs=1e-5)


def test_a_model_without_a_soft_cap_keeps_its_fast_attention(family):
    assert load(family("gemma3_text"))[0].own_attention == "sdpa"


RANDOM = [
    ("gpt2", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}),
    ("opt", {"dropout": 0.1, "layerdrop": 0.5}),
    ("seed_oss", {"attention_dropout": 0.1, "residual_dropout": 0.1}),
    ("mixtral", {"router_jitter_noise": 0.3}),
    ("phimoe", {"router_jitter_noise": 0.3, "input_jitter_noise": 0.3}),
]


@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize(("name", "changes"), RANDOM)
def test_an_unchanged_policy_has_ratio_one_and_no_kl(family, ragged_groups, name, changes, checkpointing):
    """The config of a checkpoint drops a tenth of everything, as GPT-2's does: the ratio went up to 13."""
    overrides = ["loss.kl_coef=0.1", "loss.sampler_correction=null", "train.num_epochs=2"]
    overrides += [f"model.gradient_checkpointing={checkpointing}"]
    policy, config = load(family(name, **changes), *overrides)
    policy.settle_attention()
    groups, _ = ragged_groups(num_groups=2, group_size=3)
    advantages = compute_advantages(groups, config=config.advantage, weights={"math": 1.0})
    rules = pack_rules(config, share_prompts=policy.shares_prompts)
    optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.0)
    batches = pack(groups, advantages, rules)
    policy.weights().canary()
    reference = make_reference(policy, moves=False)
    metrics = update_policy(
        policy, optimizer, batches, config.loss, world=alone(), reference=reference, num_epochs=2
    ).metrics
    assert metrics["policy/ratio_max"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["policy/kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["policy/grad_norm"] > 0


@pytest.mark.parametrize(("name", "changes"), RANDOM[:2])
def test_gradient_checkpointing_stays_on_without_dropout(family, name, changes):
    """A layer is computed once for the loss and once more for its gradient, also after a canary."""
    policy, _ = load(family(name, **changes), "model.gradient_checkpointing=true")
    policy.settle_attention()
    policy.weights().canary()
    calls: list[bool] = []
    layers = [m for m in policy.model.modules() if type(m).__name__ in ("GPT2Block", "OPTDecoderLayer")]
    part = next(layers[0].children())  # hooks of the layer itself may stand outside of what is recomputed
    part.register_forward_pre_hook(lambda *_: calls.append(layers[0].training))
    logprobs(policy, row_of([3, 4])).sum().backward()
    assert calls == [False, False]


def test_adapters_with_dropout_are_refused_where_log_probs_are_compared():
    with pytest.raises(ValueError, match=r"model\.lora\.dropout=0\.1 makes log-probs random"):
        load_config(None, ["model.lora={dropout: 0.1}"])


def test_packed_rows_are_off_where_one_long_sequence_moves_the_others(family):
    """Phi-3's longrope: a sequence of 90 tokens gave those of 40 its factors, 1.9 nats off."""
    folder = family("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=64)
    policy, _ = load(folder)
    assert "(longrope) of a whole row change" in (policy.settle_attention() or "")
    assert not policy.scorer.padded
    assert far_from(eager(folder), policy, row_of([30, 80, 20])) < 1e-5
    policy.set_packed(True)  # is refused
    assert far_from(eager(folder), policy, row_of([30, 80, 20])) < 1e-5
    assert load(folder)[0].settle_attention(64) is None


def test_a_run_beyond_the_original_length_has_the_long_factors_everywhere(family):
    """As vLLM has them for every sequence of an engine that may exceed it."""
    folder = family("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=64)
    policy, _ = load(folder)
    assert policy.settle_attention(90) is None and policy.long_factors
    assert moving_rope(policy.model) is None
    long = eager(
        family("phi3", rope_parameters=LONGROPE | {"short_factor": LONG}, original_max_position_embeddings=64)
    )
    batch = row_of([30, 70, 20])
    assert far_from(long, policy, batch) < 1e-5
    reference = make_reference(policy, moves=False)
    theirs = reference.logprobs(prepared(policy, batch))
    torch.testing.assert_close(theirs, logprobs(policy, batch).detach())


def test_sequences_at_which_rotary_frequencies_begin_to_grow_are_refused(family):
    """Beyond their first length they depend on the longest sequence so far: a log-prob has no value."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    folder = family("llama", rope_parameters=rope, max_position_embeddings=64)
    policy, _ = load(folder)
    assert "(dynamic) of a whole row change" in (policy.settle_attention() or "")
    assert far_from(eager(folder), policy, row_of([54, 20])) < 1e-5
    with pytest.raises(ValueError, match="a sequence of 65 tokens exceeds 64, beyond which the dynamic"):
        logprobs(policy, row_of([20, 55]))
    with pytest.raises(ValueError, match="a sequence of 90 tokens exceeds 64"):
        load(folder)[0].settle_attention(90)
    assert load(folder)[0].settle_attention(64) is None


def test_rows_are_padded_where_none_sees_what_is_on_its_right(family):
    """Padding is never the id that transformers warns about. A layer that sees the whole row is refused."""
    policy, _ = load(family("gpt_neo"))
    batch, read = micro_batch_of([[row] for row in row_of([30, 2, 20]).rows]), []
    embedding = policy.model.transformer.wte
    assert policy.settle_attention(60) is not None and policy.scorer.padded
    hook = embedding.register_forward_hook(lambda _, ids, out: read.append(ids[0]))
    assert far_from(policy.model, policy, batch) < 1e-5
    assert [len(ids) for ids in read[3:]] == [3]  # after those of the plain model
    assert not (read[-1] == policy.model.config.pad_token_id).any()
    hook.remove()
    embedding.register_forward_hook(lambda _, ids, out: out - 0.1 * out.mean(1, keepdim=True))
    with pytest.raises(ValueError, match="this is not a causal language model"):
        policy.settle_attention(60)


@pytest.mark.parametrize("name", ["phimoe", "doge"])
def test_a_window_that_attention_never_hears_of_is_found_above_64(family, name):
    """The probe is longer than a window that the run may exceed: 70 tokens here."""
    folder = family(name, sliding_window=70)
    policy, _ = load(folder)
    reason = policy.settle_attention(120)
    assert "packed log-probs differ" in (reason or "")
    assert far_from(eager(folder), policy, row_of([80, 20])) < 1e-4


def test_no_probe_has_an_id_for_which_there_are_no_logits(family):
    """Inkling 2 has more rows of embedding: here 120, and 20 logits."""
    policy, _ = load(family("llama"))
    policy.model.set_output_embeddings(torch.nn.Linear(32, 20, bias=False))
    assert num_ids(policy.model) == 20
    assert int(probe_batch(policy.model, 60).token_ids_N.max()) < 20


def test_a_windows_probe_is_no_longer_than_the_run(family):
    policy, _ = load(family("mistral", sliding_window=70))
    assert probe_batch(policy.model, 60).layout.longest == 12
    assert probe_batch(policy.model, 120).layout.longest == 85  # prompt 5, completion 7 + 70 + 3


def test_the_router_of_phimoe_cannot_have_an_adapter_and_the_key_is_named(family):
    with pytest.raises(
        ValueError, match=r"model\.lora\.target_modules='all-linear': PhimoeForCausalLM cannot"
    ):
        load(family("phimoe"), "model.lora={r: 4}")


@pytest.mark.parametrize("name", ["rwkv", "lfm2", "blt"])
def test_a_cache_that_loses_the_prompt_is_not_sampled_with(family, name, recwarn):
    """RWKV sampled as if there were no prompt (0.6 nats), LFM2 and BLT raised."""
    folder = family(name)
    engine = TransformersEngine(folder, transformers.AutoTokenizer.from_pretrained(folder))
    assert engine.cache == {"rwkv": "none", "lfm2": "own", "blt": "none"}[name]
    prompts = [Prompt("a", "", (5, 6, 7)), Prompt("b", "", tuple(range(8, 24)))]
    sampling = SamplingParams(temperature=1.0, max_completion_length=6)
    plain = eager(folder)
    for group in engine.generate(call(prompts, num_completions=2, sampling=sampling, seeds=[0, 1])):
        for completion in group.completions:
            ids = [*group.prompt.token_ids, *completion.token_ids]
            expected = whole(plain, ids)[len(group.prompt.token_ids) - 1 :]
            assert completion.behavior_logprobs == pytest.approx(expected, abs=1e-4)


def test_a_window_beyond_the_models_positions_leaves_its_cache_usable(family):
    """GPT-Neo's window is 256; a prompt that exceeds it has no embedding where there are 128 positions."""
    folder = family("gpt_neo", max_position_embeddings=128, window_size=256)
    engine = TransformersEngine(folder, transformers.AutoTokenizer.from_pretrained(folder))
    assert engine.cache == "shared"


def test_a_model_whose_log_probs_round_more_is_trained_packed_all_the_same(family):
    """Logits of thousands, as those of a model that is sure of what it learnt and gets noise."""
    folder = sure(family("llama"))
    policy, _ = load(folder)
    assert policy.settle_attention() is None
    assert (
        2e-4 < policy.rounding < far_from(eager(folder).double(), policy, probe_batch(policy.model)) * 8 < 1
    )


def test_an_expert_that_rounding_changes_is_neither_a_view_of_what_follows_nor_a_tolerance(family):
    """As where two experts tie: among 64 more tokens, one token of the longest row has another expert."""
    policy, _ = load(family("qwen3_moe"))

    def changes(_module, _inputs, out):
        if out.shape[1] == 12 + 64:
            out[:, 6] *= -1

    policy.model.model.layers[1].mlp.register_forward_hook(changes)
    batch = probe_batch(policy.model)
    with torch.no_grad():
        plain_L, moved_L = (plain_logprobs(policy.model, batch, behind=n) for n in (0, 64))
    most = 1e-4 * plain_L.abs().mean()
    assert (moved_L - plain_L).abs().max() > 2 * most
    assert policy.settle_attention() is None
    assert policy.rounding == pytest.approx(most.item(), rel=1e-3)


def test_packed_rows_of_a_sure_model_that_see_each_other_are_found(family):
    policy, _ = load(sure(family("lfm2")))
    assert "packed log-probs differ by" in (policy.settle_attention() or "")


def test_a_model_in_which_tokens_see_what_follows_is_refused(tiny_model_dir, tmp_path):
    """transformers takes BERT for a causal language model, and says that it needs is_decoder=True."""
    config = transformers.BertConfig(
        vocab_size=500, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    policy, _ = load(tmp_path)
    with pytest.raises(ValueError, match="what stands behind their tokens: this is not a causal"):
        policy.settle_attention()
