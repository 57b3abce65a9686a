"""In bf16 on a CPU, where vLLM packs experts for its kernel: each is read back, and a stale one is named."""

import pytest
import torch
from tiny_llama import CANARY, make_tokenizer

from rollout.weight_sync import WeightSyncError, publish
from tests.rl.families import save_tiny, tiny_config
from tests.vllm_engines import needs_vllm, start_vllm

pytestmark = needs_vllm
SIZES = {  # heads of 32 and a hidden size that is a multiple of 32: vLLM's kernels on a CPU have no others
    "vocab_size": 300,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts": 8,
}
UP = "model.layers.1.mlp.experts.gate_up_proj"


class Stream:
    def __init__(self, model):
        self.model = model

    def __iter__(self):
        return iter([(n, p.detach()) for n, p in self.model.named_parameters()])

    @torch.no_grad()
    def canary(self):
        logprobs = self.model(torch.tensor([CANARY])).logits[0, :-1].float().log_softmax(-1)
        return CANARY, logprobs.gather(-1, torch.tensor(CANARY[1:])[:, None])[:, 0].tolist()


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    import transformers

    config = tiny_config("qwen3_moe", **SIZES, moe_intermediate_size=32)
    folder = save_tiny("qwen3_moe", tmp_path_factory.mktemp("model"), config)
    options = {"max_model_len": 64, "max_num_seqs": 4, "kv_cache_gib": 0.03, "process": "inside"}
    engine = start_vllm(folder, make_tokenizer(), dtype=torch.bfloat16, **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    yield engine, model
    engine.close()


@pytest.fixture
def moved(started):
    """The engine, and the model with new experts: a step of about 1e-2 in every value."""
    engine, model = started
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter += 0.01 * torch.randn_like(parameter)
    worker = engine._core._client.engine_core.model_executor.driver_worker.worker
    return engine, Stream(model), worker


def test_a_sync_compares_all_experts_where_the_kernel_reads_them(moved):
    engine, stream, worker = moved
    publish(engine, stream, version=1)
    for name in (UP, UP.replace("gate_up", "down")):
        slot = worker.cohort_slots[name]
        packed = getattr(slot.module, slot.parameter)
        assert packed.numel() >= stream.model.get_parameter(name).numel()
        assert not torch.equal(packed.flatten()[:512], stream.model.get_parameter(name).flatten()[:512])


def test_one_expert_that_keeps_its_old_weights_is_named(moved, monkeypatch):
    engine, stream, worker = moved
    slot, finish = worker.cohort_slots[UP], type(worker).cohort_finish
    publish(engine, stream, version=1)
    old = getattr(slot.module, slot.parameter)[5].clone()
    with torch.no_grad():
        stream.model.get_parameter(UP).add_(0.01)

    def forgetful(self, version):
        finish(self, version)
        with torch.no_grad():
            getattr(slot.module, slot.parameter)[5] = old

    monkeypatch.setattr(type(worker), "cohort_finish", forgetful)
    with pytest.raises(WeightSyncError, match=f"fingerprints of 1 of .* differ from the policy's: {UP}$"):
        publish(engine, stream, version=2)


def test_experts_that_are_left_out_of_a_sync_are_named(moved, monkeypatch):
    engine, stream, worker = moved
    receive = type(worker).cohort_receive
    without = lambda self, tensors: receive(self, ((n, t) for n, t in tensors if ".experts." not in n))  # noqa: E731
    monkeypatch.setattr(type(worker), "cohort_receive", without)
    with pytest.raises(
        WeightSyncError, match=r"fingerprints of 4 of .* differ .*layers\.0\.mlp\.experts\.down_proj"
    ):
        publish(engine, stream, version=3)


def test_a_kernel_whose_packing_loses_values_is_refused():
    from rollout.vllm.weights import unpacked

    def lossy(layer):
        layer.w2_weight.data.clamp_(max=7)

    with pytest.raises(
        ValueError, match=r"packs w2_weight in a way that cannot be read back.*engine.name=transformers"
    ):
        unpacked(torch.zeros(2, 4, 6), (4, 6), "w2_weight", lossy)
