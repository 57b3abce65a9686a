"""What a vLLM lacks is named when it starts."""

import pytest
import torch
from tiny_llama import make_model, make_tokenizer, save

from rollout.vllm import internals
from rollout.vllm.start import vllm_available
from tests.vllm_engines import start_vllm

REASON = vllm_available()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


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


def test_the_short_cuts_are_chosen_by_the_attribute_that_a_request_has(monkeypatch):
    from vllm.v1.request import Request

    assert internals.num_void_attribute() in internals.NUM_VOID
    monkeypatch.setattr(internals, "NUM_VOID", ("num_lost", "num_output_placeholders"))
    assert internals.num_void_attribute() == "num_output_placeholders"
    assert internals.has(Request, "_all_token_ids")  # its __init__ sets it
    assert not internals.has(Request, "num_lost")
