"""What a vLLM lacks is named when it starts."""

from types import SimpleNamespace

import pytest
import torch
from tiny_llama import make_model, make_tokenizer, save

from rollout.vllm import internals
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
        self.qkv_proj.output_sizes, self.qkv_proj.input_size, self.qkv_proj.output_size = [4, 2, 2], 3, 8
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
        (lambda m: m.qkv_proj, "output_size", "output_size in its emptied layer"),
        (lambda m: m.qkv_proj, "output_sizes", "output_sizes in its stacked layer"),
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


def test_the_short_cuts_are_chosen_by_the_attribute_that_a_request_has(monkeypatch):
    from vllm.v1.request import Request

    assert internals.num_void_attribute() in internals.NUM_VOID
    monkeypatch.setattr(internals, "NUM_VOID", ("num_lost", "num_output_placeholders"))
    assert internals.num_void_attribute() == "num_output_placeholders"
    assert internals.has(Request, "_all_token_ids")  # its __init__ sets it
    assert not internals.has(Request, "num_lost")
