"""Every causal family of transformers: its routers' weights bit for bit, a refusal by name, or no router."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import transformers
from transformers.models.jamba import modeling_jamba

from rl.moe.routers import UnknownRouter, find_routers, observed, self_check, watching
from tests.rl.families import FAMILIES, tiny_config, words

IDS = torch.arange(16)[None] * 7 % 120
ALL_LAYERS = words(
    "cohere2_moe deepseek_v4 flex_olmo gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared "
    "hunyuan_v1_moe inkling2_text minimax minimax_m2 minimax_m3_vl_text mixtral olmoe qwen2_moe "
    "qwen3_5_moe_text qwen3_next qwen4_exp_text solar_open"
)
SECOND_LAYER = words(
    "afmoe axk1 axk2 beam deepseek_v2 deepseek_v3 deepseek_v32 dots1 dots3_note_text ernie4_5_moe exaone_moe "
    "flint glm4_moe glm4_moe_lite glm_moe_dsa hy_v3 hy_v4 laguna lfm2_moe mimo_v2_flash nemotron_h "
    "sarvam_mla sarvam_moe"
)
# decoder layer: (experts, experts per token) of the tiny config of each family
SITES = {
    **{name: {0: (4, 2), 1: (4, 2)} for name in ALL_LAYERS},
    **{name: {1: (4, 2)} for name in SECOND_LAYER},
    "jamba": {1: (4, 2), 3: (4, 2)},
    "lara_mini": {0: (4, 2), 1: (4, 2), 2: (4, 2)},
    "longcat_flash": {0: (5, 2), 1: (5, 2)},  # four experts, and one that does nothing
    "bailing_hybrid": {1: (512, 8)},
    "kimi_linear": {1: (256, 8)},
    "kolibri1": {0: (384, 2), 1: (384, 2)},
    "mellum": {0: (64, 2), 1: (64, 2)},
    "qwen3_moe": {0: (128, 2), 1: (128, 2)},
}
# Experts are chosen outside the router, sorted away, scored by a sparse mixer, or share weights with others;
# or a layer is computed several times, and its router chooses each time.
REFUSED = {
    "dbrx": "DbrxFFN",
    "inkling2_loop_text": "4 layers with the weights of 3",
    "inkling_text": "InklingMoE",
    "jetmoe": "JetMoeMo",
    "llama4_text": "Llama4TextMoe",
    "phimoe": "PhimoeSparseMoeBlock",
    "zaya": "ZayaSparseMoeBlock",
}
if not hasattr(modeling_jamba, "JambaTopKRouter"):  # before transformers 5.24
    del SITES["jamba"]
    REFUSED["jamba"] = "JambaSparseMoeBlock"


def tiny(name: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(name), dtype=dtype).eval()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.3)
    for n, b in model.named_buffers():  # zero in a new model, and not in a trained one
        if "correction_bias" in n or "expert_bias" in n:
            b += 0.1 * torch.arange(b.numel()).reshape(b.shape).to(b)
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_known_routers_or_is_refused_by_name_or_is_dense(name):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(tiny_config(name))
    if name in REFUSED:
        with pytest.raises(UnknownRouter, match=REFUSED[name]):
            find_routers(model)
        return
    found = {site.layer: (site.num_experts, site.top_k) for site in find_routers(model)}
    assert found == SITES.get(name, {})


@pytest.mark.parametrize("name", sorted(SITES.keys() & set(FAMILIES)))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
def test_weights_from_logits_and_experts_are_the_routers_own_bit_for_bit(name, dtype):
    model = tiny(name, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "mixed"):
        self_check(partial(model, use_cache=False), find_routers(model), IDS)


def test_a_router_of_another_version_is_refused():
    model = tiny("olmoe")
    sites = find_routers(model)
    shorter = lambda _module, _args, output: output[1:]  # noqa: E731
    refused = pytest.raises(UnknownRouter, match="OlmoeTopKRouter returns 2 tensors")
    with model.model.layers[0].mlp.gate.register_forward_hook(shorter), refused:
        self_check(model, sites, IDS)

    def halve(site, output):
        observed(site, output)[1].mul_(0.5)

    refused = pytest.raises(UnknownRouter, match=r"layers\.0\.mlp\.gate \(OlmoeTopKRouter\) differ from ours")
    ended = []
    model.model.norm.register_forward_hook(lambda *_: ended.append(True))
    with torch.no_grad(), watching(sites, halve), refused:
        self_check(model, sites, IDS)
    assert ended  # a pass cut short leaves the layers of a split model gathered
