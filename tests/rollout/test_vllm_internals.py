"""What a vLLM lacks is named when it starts."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_llama import make_model, make_tokenizer, save

from rollout.fingerprint import HeldTensor, compared_part
from rollout.vllm import internals, weights
from rollout.vllm.names import Names
from rollout.vllm.weights import find_slots
from tests.vllm_engines import needs_vllm, start_vllm

pytestmark = needs_vllm


def start(tmp_path):
    folder = save(make_model(0), tmp_path)
    options = {"max_model_len": 64, "max_num_seqs": 4, "kv_cache_gib": 0.03, "process": "inside"}
    return start_vllm(folder, make_tokenizer(), dtype=torch.float32, **options)


def test_a_method_that_vllm_has_lost_is_named_at_the_start(tmp_path, monkeypatch):
    from vllm.v1.request import Request

    monkeypatch.delattr(Request, "update_block_hashes")
    wanted = r"vLLM [\d.+a-z]+ has no update_block_hashes in its vllm\.v1\.request\.Request.*vllm>=0\.25\.1"
    with pytest.raises(ValueError, match=wanted):
        start(tmp_path)


def test_a_private_attribute_that_vllm_has_lost_is_named_with_its_path(tmp_path, monkeypatch):
    from vllm.v1.engine.output_processor import OutputProcessor

    monkeypatch.delattr(OutputProcessor, "add_request")
    with pytest.raises(ValueError, match=r"has no output_processor\.add_request in its engine"):
        start(tmp_path)


def test_a_layer_class_that_sets_no_method_is_named_at_the_start(tmp_path, monkeypatch):
    from vllm.model_executor.layers.linear import LinearBase

    monkeypatch.setattr(LinearBase, "__init__", lambda self: None)
    with pytest.raises(
        ValueError, match=r"has no quant_method in its vllm\.model_executor\.layers\.linear\."
    ):
        start(tmp_path)


def test_what_a_sync_reads_of_the_layers_is_looked_for_when_the_worker_starts(tmp_path, monkeypatch):
    """As a vLLM that keeps the kernel of an emptied layer under another name."""
    monkeypatch.setitem(internals.PATHS["emptied layer"], "cpu_linear", "cpu_kernel")
    with pytest.raises(ValueError, match="has no cpu_kernel in its emptied layer"):
        start(tmp_path)


class Layers(torch.nn.Module):
    """As on a CPU: `qkv_proj` stacks three tensors, and `weight` was moved into a packed copy."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.qkv_proj, self.experts = torch.nn.Module(), torch.nn.Module()
        self.qkv_proj.weight = torch.nn.Parameter(torch.empty(0))
        self.qkv_proj.output_partition_sizes, self.qkv_proj.input_size = [4, 2, 2], 3
        self.qkv_proj.cpu_linear = torch.nn.functional.linear
        methods = {"apply": 0, "process_weights_after_loading": 0}
        self.qkv_proj.quant_method = SimpleNamespace(**methods)
        self.experts.w13_weight = torch.nn.Parameter(torch.zeros(2, 4, 3))
        kernel = SimpleNamespace(fused_experts=SimpleNamespace(**methods))
        self.experts.quant_method = SimpleNamespace(moe_kernel=kernel)


def test_every_attribute_of_a_layer_that_a_sync_needs_is_named_when_it_is_missing():
    slots = find_slots(Layers(), Names(None, Layers()))
    assert [(name, slot.first, slot.last) for name, slot in slots.items()] == [
        ("q_proj.weight", 0, 4),
        ("k_proj.weight", 4, 6),
        ("v_proj.weight", 6, 8),
        ("experts.gate_up_proj", 0, 2),
    ]
    lost = [
        (lambda m: m.qkv_proj, "cpu_linear", "cpu_linear in its emptied layer"),
        (lambda m: m.qkv_proj, "input_size", "input_size in its emptied layer"),
        (lambda m: m.qkv_proj, "output_partition_sizes", "output_partition_sizes in its emptied layer"),
        (lambda m: m.qkv_proj, "quant_method", r"quant_method\.apply in its packed weight"),
        (lambda m: m.qkv_proj.quant_method, "apply", r"quant_method\.apply in its packed weight"),
        (
            lambda m: m.qkv_proj.quant_method,
            "process_weights_after_loading",
            r"quant_method\.process_weights_after_loading in its packed weight",
        ),
        (
            lambda m: m.experts.quant_method.moe_kernel,
            "fused_experts",
            r"quant_method\.moe_kernel\.fused_experts\.process_weights_after_loading in its packed experts",
        ),
    ]
    for owner, name, said in lost:
        model = Layers()
        delattr(owner(model), name)
        with pytest.raises(ValueError, match=f"has no {said}"):
            find_slots(model, Names(None, model))


class Split(torch.nn.Module):
    """vLLM's layers on worker 3 of 4: two workers share a head of keys, and the last ids are padding."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        for name, shape, given in (
            (
                "qkv_proj",
                (8, 6),
                {"output_size": 32, "output_partition_sizes": [4, 2, 2], "num_kv_head_replicas": 2},
            ),
            ("gate_up_proj", (4, 6), {"output_size": 16, "output_partition_sizes": [2, 2]}),
            (
                "down_proj",
                (6, 2),
                {"output_size": 6, "output_partition_sizes": [6], "input_size_per_partition": 2},
            ),
            ("gate", (3, 6), {"output_size": 3, "output_partition_sizes": [3]}),
        ):
            module = torch.nn.Module()
            module.weight = torch.nn.Parameter(torch.zeros(shape))
            vars(module).update({"tp_rank": 3, "input_size": 8 if name == "down_proj" else 6} | given)
            self.add_module(name, module)
        self.embed, self.experts = torch.nn.Module(), torch.nn.Module()
        self.embed.weight, self.embed.org_vocab_size = torch.nn.Parameter(torch.zeros(16, 6)), 61
        vars(self.embed)["shard_indices"] = SimpleNamespace(org_vocab_start_index=48, org_vocab_end_index=61)


def test_slices_of_a_worker_are_found_by_the_rules_of_vllms_layers():
    """By hand. gate_up_proj is one tensor of 8 gates and 8 ups, as in Phi-3's checkpoints."""
    found = find_slots(Split(), Names(None, Split()))
    expected = {
        "q_proj.weight": ((16, 6), 0, [(12, 16)], 0, 4),
        "k_proj.weight": ((4, 6), 0, [(2, 4)], 4, 6),
        "v_proj.weight": ((4, 6), 0, [(2, 4)], 6, 8),
        "gate_up_proj.weight": ((16, 6), 0, [(6, 8), (14, 16)], 0, 4),
        "down_proj.weight": ((6, 8), 1, [(6, 8)], 0, 6),
        "gate.weight": ((3, 6), 0, (), 0, 3),
        "embed.weight": ((61, 6), 0, [(48, 61)], 0, 13),
    }
    slots = {n: (s.held.shape, s.held.axis, s.held.ranges, s.first, s.last) for n, s in found.items()}
    assert slots == {n: (s, axis, tuple(cut), *ends) for n, (s, axis, cut, *ends) in expected.items()}
    experts = SimpleNamespace(moe_config=SimpleNamespace(tp_size=4, tp_rank=3))
    ranges = lambda name, shape, turned: weights._cut_of_experts(experts, name, shape, turned)  # noqa: E731
    assert ranges("w13_weight", (2, 16, 6), False) == (1, [(6, 8), (14, 16)])
    assert ranges("w13_weight", (2, 6, 16), True) == (2, [(6, 8), (14, 16)])
    assert ranges("w2_weight", (2, 6, 8), False) == (2, [(6, 8)])
    assert ranges("w2_weight", (2, 8, 6), True) == (1, [(6, 8)])


def test_a_slice_is_cut_out_of_a_whole_tensor_and_put_back():
    whole = torch.arange(24.0).view(2, 12)
    held = HeldTensor((2, 12), torch.float32, torch.device("cpu"), "x", False, 1, [(1, 3), (8, 11)])
    assert held.own_shape == (2, 5)
    assert held.own(whole).tolist() == [[1, 2, 8, 9, 10], [13, 14, 20, 21, 22]]
    row = [0, 1, 2, 0, 0, 0, 0, 0, 8, 9, 10, 0]
    assert held.spread(held.own(whole))[0].tolist() == row
    assert compared_part(whole, replace(held, sampled=True, dtype=torch.bfloat16), 0).T.tolist() == [
        [1, 2, 8, 9, 10],
        [13, 14, 20, 21, 22],
    ]


def test_the_short_cuts_are_chosen_by_the_attribute_that_a_request_has(monkeypatch):
    from vllm.v1.request import Request

    assert internals.num_void_attribute() in internals.NUM_VOID
    monkeypatch.setattr(internals, "NUM_VOID", ("num_lost", "num_output_placeholders"))
    assert internals.num_void_attribute() == "num_output_placeholders"
    assert internals.has(Request, "_all_token_ids")  # its __init__ sets it
    assert not internals.has(Request, "num_lost")
