"""A diffusion model is its causal model with an all-ones mask, in every way it can be run."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rl.diffusion.model import (
    DiffusionScorer,
    find_mask_token,
    hidden_states,
    load_diffusion_model,
    logits_at,
    to_diffusion,
)
from rl.model.bidirectional import BIDIRECTIONAL, Documents
from tests.diffusion.conftest import MASK, SMALL, VOCABULARY, randomised

LENGTHS = [7, 1, 12, 3]
IDS = torch.randint(4, VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))


def tiny(seed: int = 0, **changes) -> LlamaForCausalLM:
    return randomised(LlamaForCausalLM(LlamaConfig(**SMALL | changes)), seed)  # type: ignore[return-value]


def all_logits(model, ids, lengths):
    documents = Documents.of(lengths)
    return logits_at(model, hidden_states(model, ids, documents), torch.arange(len(ids)), documents)


def stock_logits(model, ids, lengths, implementation):
    """transformers' own forward on a padded batch with an explicit mask: every token sees its whole row."""
    model.set_attn_implementation(implementation)
    width = max(lengths)
    rows = torch.zeros(len(lengths), width, dtype=torch.long)
    mask = torch.zeros(len(lengths), 1, width, width, dtype=torch.bool)
    for b, piece in enumerate(ids.split(lengths)):
        rows[b, : len(piece)] = piece
        mask[b, :, :, : len(piece)] = True
    if implementation == "eager":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    logits = model(input_ids=rows, attention_mask=mask, use_cache=False).logits
    return torch.cat([logits[b, :n] for b, n in enumerate(lengths)])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [[23], LENGTHS, [6, 6, 6, 5], [5] * 4])
def test_packed_rows_equal_padded_rows_under_an_explicit_all_ones_mask(lengths, implementation):
    ids = IDS[: sum(lengths)]
    with torch.no_grad():
        expected = stock_logits(tiny(), ids, lengths, implementation)
        ours = all_logits(to_diffusion(tiny(), mask_token_id=MASK), ids, lengths)
    assert (ours - expected).abs().max() <= 1e-5


def test_the_last_token_reaches_the_first_logit_and_no_other_document():
    model = to_diffusion(tiny(), mask_token_id=MASK)
    changed = IDS.clone()
    changed[LENGTHS[0] - 1] = 4
    with torch.no_grad():
        before, after = (all_logits(model, ids, LENGTHS) for ids in (IDS, changed))
    assert (before[0] - after[0]).abs().max() > 1e-2
    assert (before[LENGTHS[0] :] == after[LENGTHS[0] :]).all()


def test_a_saved_folder_opened_by_stock_transformers_is_not_silently_causal(tmp_path):
    model = to_diffusion(tiny(), mask_token_id=MASK)
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = all_logits(model, IDS[:7], [7])
        for implementation in ("sdpa", "eager"):
            stock.set_attn_implementation(implementation)
            torch.testing.assert_close(
                stock(input_ids=IDS[None, :7]).logits[0], expected, rtol=1e-5, atol=1e-5
            )
    again = load_diffusion_model(str(tmp_path))
    assert (again.config.mask_token_id, again.config._attn_implementation) == (MASK, BIDIRECTIONAL)


def test_shifted_alignment_reads_the_left_neighbour_within_a_document():
    plain, shifted = (to_diffusion(tiny(), mask_token_id=MASK, shift=s) for s in (False, True))
    with torch.no_grad():
        expected, ours = (all_logits(m, IDS, LENGTHS) for m in (plain, shifted))
        scored = [
            DiffusionScorer(m)(IDS, Documents.of(LENGTHS), torch.arange(len(IDS)), IDS)[0]
            for m in (plain, shifted)
        ]
    starts = [0, 7, 8, 20]
    left = torch.tensor([c if c in starts else c - 1 for c in range(len(IDS))])
    assert (ours == expected[left]).all()
    for logits, logprobs in zip((expected, ours), scored, strict=True):
        by_hand = torch.log_softmax(logits, -1).gather(-1, IDS[:, None]).squeeze(-1)
        torch.testing.assert_close(logprobs, by_hand, rtol=1e-5, atol=1e-5)


def gradients(model, *, compiled: bool = False) -> dict[str, torch.Tensor]:
    scorer = DiffusionScorer(model).train()
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    columns = torch.arange(0, len(IDS), 2)
    noisy = IDS.index_fill(0, columns, MASK)
    for lengths in (LENGTHS, [12, 11]):
        scorer(noisy, Documents.of(lengths), columns, IDS[columns])[0].sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["checkpointing", "compile", "both"])
def test_checkpointing_and_compiling_change_no_gradient(how):
    expected = gradients(to_diffusion(tiny(), mask_token_id=MASK))
    model = to_diffusion(tiny(), mask_token_id=MASK)
    if how != "compile":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ours = gradients(model, compiled=how != "checkpointing")
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5)


def test_lora_adapters_train_and_a_zero_adapter_changes_nothing():
    from peft import LoraConfig, get_peft_model

    model = to_diffusion(tiny(), mask_token_id=MASK)
    with torch.no_grad():
        before = all_logits(model, IDS, LENGTHS)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))  # type: ignore[arg-type]
    with torch.no_grad():
        assert (all_logits(model, IDS, LENGTHS) == before).all()
    found = gradients(model)
    assert found and all("lora_" in name for name in found)
    assert any(g.abs().max() > 0 for g in found.values())
    assert peft_model.num_parameters(only_trainable=True) < model.num_parameters() / 2


CONVERTED = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.5},
    "Phi3": {},
}


@pytest.mark.parametrize("family", CONVERTED)
def test_other_families_convert_and_keep_their_own_head(family):
    config = getattr(transformers, f"{family}Config")(**SMALL | CONVERTED[family])
    make = lambda: randomised(getattr(transformers, f"{family}ForCausalLM")(config)).eval()  # noqa: E731
    with torch.no_grad():
        expected = stock_logits(make(), IDS, LENGTHS, "sdpa")
        ours = all_logits(to_diffusion(make(), mask_token_id=MASK), IDS, LENGTHS)
    assert (ours - expected).abs().max() <= 1e-5


def test_models_that_cannot_see_both_sides_are_refused():
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4)
    )
    with pytest.raises(ValueError, match="MambaForCausalLM stays causal"):
        to_diffusion(randomised(mamba), mask_token_id=MASK)  # type: ignore[arg-type]
    gemma = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SMALL, head_dim=8, sliding_window=64))
    with pytest.raises(ValueError, match="no bidirectional form"):
        to_diffusion(gemma, mask_token_id=MASK)
    mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, sliding_window=6))
    model = to_diffusion(mistral, mask_token_id=MASK)
    with pytest.raises(ValueError, match="window of 6 tokens, but a document has 12"):
        all_logits(model, IDS, LENGTHS)


def test_misuse_gets_a_sentence():
    with pytest.raises(ValueError, match=r"LlamaForCausalLM attends by 'sdpa', which is causal"):
        hidden_states(tiny(), IDS, Documents.of(LENGTHS))
    model = to_diffusion(tiny(), mask_token_id=MASK)
    with pytest.raises(ValueError, match="got no cohort_documents"):
        model(input_ids=IDS[None])
    with pytest.raises(ValueError, match="documents of 22 tokens do not cover a row of 23"):
        hidden_states(model, IDS, Documents.of([22]))
    with pytest.raises(ValueError, match="each needs at least one"):
        Documents.of([3, 0])
    with pytest.raises(ValueError, match="not one of the model's 60 vocabulary rows"):
        to_diffusion(tiny(), mask_token_id=60)
    with pytest.raises(ValueError, match="also the end-of-text token"):
        to_diffusion(tiny(), mask_token_id=1)


def test_the_mask_token_is_the_wanted_one_or_a_row_that_no_text_uses(tiny_model_dir):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_dir)
    size = len(tokenizer)
    config = LlamaConfig(**SMALL | {"vocab_size": size})
    assert find_mask_token(tokenizer, config, "<unk>") == 2
    assert find_mask_token(tokenizer, config, 7) == 7
    assert find_mask_token(tokenizer, LlamaConfig(**SMALL | {"vocab_size": size + 4})) == size
    config.mask_token_id = 9
    assert find_mask_token(tokenizer, config) == 9
    del config.mask_token_id
    with pytest.raises(ValueError, match=r"no mask token, no spare vocabulary row.*<user>"):
        find_mask_token(tokenizer, config)
    with pytest.raises(ValueError, match=r"model.mask_token='<mask>' is not in the vocabulary"):
        find_mask_token(tokenizer, config, "<mask>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_7|>"]})
    assert find_mask_token(tokenizer, LlamaConfig(**SMALL | {"vocab_size": size + 1})) == size


def test_a_causal_checkpoint_without_a_mask_token_is_refused(tiny_model_dir):
    with pytest.raises(ValueError, match=r"names no mask token \(mask_token_id in config.json\)"):
        load_diffusion_model(str(tiny_model_dir))
