"""Two varlen calls and their merge, in fp64 on torch's own CPU flash kernels, against masked attention."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from rl.model.varlen import Kernels, Segments, VarlenPlan, shared_prompt_attention

CPU = torch.device("cpu")


def _runs(segments: Segments) -> list[slice]:
    ends = segments.ends.tolist()
    return [slice(a, b) for a, b in pairwise(ends)]


def _heads(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[n, Hk, D] as [1, Hq, n, D]: the CPU kernel takes no grouped heads."""
    return x.repeat_interleave(num_heads // x.shape[1], dim=1).transpose(0, 1)[None].contiguous()


def forward(q, k, v, queries, keys, causal, scale):
    out, lse = torch.full_like(q, torch.nan), q.new_full((q.shape[1], len(q)), torch.nan)
    for a, b in zip(_runs(queries), _runs(keys), strict=True):
        heads = [_heads(x, q.shape[1]) for x in (q[a], k[b], v[b])]
        piece, piece_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *heads, 0.0, causal, scale=scale
        )
        out[a], lse[:, a] = piece[0].transpose(0, 1), piece_lse[0]
    return out, lse


def backward(grad_out, q, k, v, out, lse, queries, keys, causal, scale):
    num_heads, group = q.shape[1], q.shape[1] // k.shape[1]
    grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    for a, b in zip(_runs(queries), _runs(keys), strict=True):
        sides = [_heads(x, num_heads) for x in (grad_out[a], q[a], k[b], v[b], out[a])]
        pieces = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *sides, lse[None, :, a].contiguous(), 0.0, causal, scale=scale
        )
        for grad, piece, run in zip(grads, pieces, (a, b, b), strict=True):
            rows = piece[0].transpose(0, 1)
            grad[run] = rows if grad is grads[0] else rows.unflatten(1, (-1, group)).sum(2)
    return tuple(grads)


KERNELS = Kernels(forward, backward)
BLOCKS = [(5, [3, 1, 7]), (2, []), (4, [6]), (1, [2, 2]), (9, [1, 12, 4])]


def _visible(blocks: list[tuple[int, list[int]]]) -> torch.Tensor:
    """[N, N] True where a row sees a column: written from the definition, block by block."""
    total = sum(p + sum(lengths) for p, lengths in blocks)
    sees = torch.zeros(total, total, dtype=torch.bool)
    start = 0
    for prompt, lengths in blocks:
        sees[start : start + prompt, start : start + prompt] = torch.ones(prompt, prompt).tril().bool()
        own = start + prompt
        for n in lengths:
            sees[own : own + n, start : start + prompt] = True
            sees[own : own + n, own : own + n] = torch.ones(n, n).tril().bool()
            own += n
        start = own
    return sees


def _expected(q, k, v, blocks, scale):
    keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, keys) * scale
    weights = scores.masked_fill(~_visible(blocks), -torch.inf).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weights, values)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_output_and_gradients_equal_masked_attention(kv_heads):
    torch.manual_seed(0)
    total = sum(p + sum(lengths) for p, lengths in BLOCKS)
    q, grad = torch.randn(2, total, 4, 8, dtype=torch.float64).unbind()
    k, v = torch.randn(2, total, kv_heads, 8, dtype=torch.float64).unbind()
    inputs = [x.requires_grad_() for x in (q, k, v)]

    ours = shared_prompt_attention(*inputs, VarlenPlan.of(BLOCKS, CPU), scale=0.3, kernels=KERNELS)
    theirs = _expected(*inputs, BLOCKS, 0.3)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    our_grads = torch.autograd.grad(ours, inputs, grad)
    for mine, other in zip(our_grads, torch.autograd.grad(theirs, inputs, grad), strict=True):
        assert other.abs().max() > 0.1
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


def test_documents_see_all_of_themselves_and_nothing_else():
    torch.manual_seed(0)
    lengths = [3, 1, 6]
    q, grad = torch.randn(2, 10, 4, 8, dtype=torch.float64).unbind()
    k, v = torch.randn(2, 10, 2, 8, dtype=torch.float64).unbind()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    ours = shared_prompt_attention(*inputs, VarlenPlan.documents(lengths, CPU), scale=0.3, kernels=KERNELS)
    pieces = []
    for a, b, c in zip(*(x.split(lengths) for x in inputs), strict=True):
        weights = torch.einsum("nhd,mhd->hnm", a, b.repeat_interleave(2, dim=1)).mul(0.3).softmax(-1)
        pieces.append(torch.einsum("hnm,mhd->nhd", weights, c.repeat_interleave(2, dim=1)))
    theirs = torch.cat(pieces)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    our_grads = torch.autograd.grad(ours, inputs, grad)
    for mine, other in zip(our_grads, torch.autograd.grad(theirs, inputs, grad), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


def test_a_prompt_with_one_completion_needs_one_call_only():
    plan = VarlenPlan.of([(4, [6]), (3, [])], CPU)
    assert plan.own.ends.tolist() == [0, 10, 13]
    assert len(plan.answers_C) == 0


def test_shared_prompts_are_the_only_columns_of_the_second_call():
    plan = VarlenPlan.of([(4, [6]), (2, [1, 3])], CPU)
    assert plan.own.ends.tolist() == [0, 10, 12, 13, 16]
    assert plan.prompts_P.tolist() == [10, 11]
    assert plan.answers_C.tolist() == [12, 13, 14, 15]
    assert (plan.answer_groups.ends.tolist(), plan.answer_groups.longest) == ([0, 4], 4)
