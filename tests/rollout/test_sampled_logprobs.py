"""Kernels for log-probs of sampled tokens, by Triton's interpreter: no GPU is needed."""

import os
import subprocess
import sys

import pytest

from tests.vllm_engines import needs_vllm

pytest.importorskip("triton")

ROWS = """
import torch
from rollout.sampled_logprobs import sampled_logprobs
torch.manual_seed(0)
for columns in (5, 4096, 10000, 12289):
    for dtype in (torch.float32, torch.bfloat16):
        rows = torch.randn(6, columns + 7).mul(4).to(dtype)[:, :columns]
        ids = torch.randint(0, columns, (6,))
        rows[1, rows[1] < rows[1, ids[1]]] = -torch.inf  # as of a cut distribution
        if columns > 4096:
            rows[2, :4096], ids[2] = -torch.inf, columns - 1  # nothing is left in a whole part
        rows[3, 1] = torch.nan
        logprobs, ranks = sampled_logprobs(rows, ids)
        wanted = rows.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]
        assert logprobs.dtype == torch.float32 and logprobs.isnan().tolist() == [i == 3 for i in range(6)]
        assert logprobs.double().allclose(wanted, rtol=0, atol=1e-5, equal_nan=True)
        assert ranks.tolist() == (rows >= rows.gather(1, ids[:, None])).sum(-1).tolist()
"""
IN_VLLM = """
import logging, torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample import sampler
from rollout.vllm import internals
name = next(name for name in internals.OF_SAMPLED if hasattr(sampler, name))
logits, ids, calls, said = torch.randn(4, 5000), torch.tensor([1, 4999, 7, 7]), [], []
logging.getLogger("rollout.vllm.internals").warning = said.append

def of_vllm(wrong):
    def compute(logits, number, ids, cu=None, **more):
        calls.append(number)
        found = logits.log_softmax(-1).gather(1, ids[:, None]) + wrong
        ranks = (logits >= logits.gather(1, ids[:, None])).sum(-1)
        return LogprobsTensors(ids[:, None], found, ranks + (8192 * found[:, 0].isinf()))
    return compute

logits[3, 7] = -torch.inf  # vLLM counts its padding as well in the rank of such an id
for wrong, after in ((0.0, 1), (0.01, 3)):
    plain = of_vllm(wrong)
    setattr(sampler, name, plain)
    internals.quicken_logprobs()
    quick = getattr(sampler, name)
    internals.quicken_logprobs()
    assert getattr(sampler, name) is quick and quick.__wrapped__ is plain
    calls.clear()
    for _ in range(3):
        found = quick(logits, 0, ids, None, max_per_req_token_ids=0)
        assert torch.allclose(found.logprobs, plain(logits, 0, ids).logprobs, atol=1e-5)
        assert torch.equal(found.selected_token_ranks[:3], plain(logits, 0, ids).selected_token_ranks[:3])
        assert torch.equal(found.logprob_token_ids, ids[:, None])
        del calls[-2:]
    assert len(calls) == after and len(said) == (wrong > 0)
    for number, more in ((5, {}), (0, {"max_per_req_token_ids": 2})):
        quick(logits, number, ids, None, **more)
    assert calls[-2:] == [5, 0] and len(calls) == after + 2
"""


def interpreted(code: str) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_log_probs_and_ranks_are_those_of_the_whole_row():
    interpreted(ROWS)


@needs_vllm
def test_vllms_own_log_probs_are_used_where_they_differ_or_more_is_asked_for():
    interpreted(IN_VLLM)
