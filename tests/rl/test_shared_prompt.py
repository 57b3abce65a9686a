"""Varlen calls, joined or merged, in fp64 on torch's own CPU flash kernels, against masked attention."""

from __future__ import annotations

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from rl.causal import CausalPolicy
from rl.config.read import load_config
from rl.model import packed
from rl.model.packed import Block, Layout, branches_of, packed_attention
from rl.model.varlen import shared_prompt_attention
from rl.model.varlen_plan import VarlenPlan
from tests.rl.cpu_kernels import KERNELS
from tests.rl.families import save_tiny, tiny_config

CPU = torch.device("cpu")


BLOCKS = [(5, 3, 1, 7), (2,), (4, 6), (1, 2, 2), (9, 1, 12, 4)]
# Of the first block: the first completion goes on from 2 tokens of the third, the second from 6 of them.
BRANCHES = [(range(9, 11), range(5, 8)), (range(9, 15), range(8, 9))]


def _visible(blocks: list[tuple[int, ...]], branches: list[tuple[range, range]]) -> torch.Tensor:
    """[N, N] True where a row sees a column: written from the definition, block by block."""
    total = sum(map(sum, blocks))
    sees = torch.zeros(total, total, dtype=torch.bool)
    start = 0
    for shared, own in branches:
        sees[own.start : own.stop, shared.start : shared.stop] = True
    for prompt, *lengths in blocks:
        sees[start : start + prompt, start : start + prompt] = torch.ones(prompt, prompt).tril().bool()
        own = start + prompt
        for n in lengths:
            sees[own : own + n, start : start + prompt] = True
            sees[own : own + n, own : own + n] = torch.ones(n, n).tril().bool()
            own += n
        start = own
    return sees


def _places() -> torch.Tensor:
    """[N] how many columns come before each in its own sequence."""
    places, start = torch.zeros(sum(map(sum, BLOCKS)), dtype=torch.long), 0
    for prompt, *lengths in BLOCKS:
        for n in (0, *lengths):
            places[start : start + (n or prompt)] = torch.arange(n or prompt) + (prompt if n else 0)
            start += n or prompt
    return places


def _expected(q, k, v, sinks, branches, scale, window):
    keys, values = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, keys) * scale
    places = _places()
    for shared, own in branches:
        places[own.start : own.stop] += len(shared)
    sees = _visible(BLOCKS, branches) & (places[:, None] - places < window)
    scores = scores.masked_fill(~sees, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, len(q), 1)], dim=-1)
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1)[..., : len(k)], values)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(
    ("joined", "window"), [(True, None), (False, None), (True, 1), (True, 4), (False, 11)]
)
@pytest.mark.parametrize(("kv_heads", "branches"), [(1, []), (2, BRANCHES), (4, []), (4, BRANCHES)])
def test_output_and_gradients_equal_masked_attention(kv_heads, branches, joined, window, has_sinks):
    torch.manual_seed(0)
    total = sum(map(sum, BLOCKS))
    q, grad = torch.randn(2, total, 4, 8, dtype=torch.float64).unbind()
    k, v = torch.randn(2, total, kv_heads, 8, dtype=torch.float64).unbind()
    sinks = torch.randn(4, dtype=torch.float64) if has_sinks else None
    inputs = [x.requires_grad_() for x in (q, k, v, sinks) if x is not None]

    calls = [branches[:1], branches[1:]]
    plan = VarlenPlan.of(BLOCKS, CPU, branches=calls, may_join=joined, window=window)
    assert (plan.own.seen_S is not None) == (joined or window is not None) == (not plan.crossings)
    ours = shared_prompt_attention(q, k, v, plan, scale=0.3, sinks_H=sinks, kernels=KERNELS)
    theirs = _expected(q, k, v, sinks, branches, 0.3, window or total)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    our_grads = torch.autograd.grad(ours, inputs, grad)
    for mine, other in zip(
        our_grads, torch.autograd.grad(theirs, inputs, grad, allow_unused=True), strict=True
    ):
        assert window == 1 or other.abs().max() > 0.1
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["gpt_oss", "gemma3_text", "mistral", "olmo3"])
def test_windows_and_sinks_by_varlen_calls_have_the_gradients_of_whole_scores(
    tmp_path, tiny_model_dir, ragged_groups, gradients, monkeypatch, name
):
    """By the code of GPUs, on a CPU's kernels. Sequences have up to 13 tokens, the window 5."""
    save_tiny(name, tmp_path, tiny_config(name, sliding_window=5))
    transformers.AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    words = [f"model.name={tmp_path}", "model.dtype=fp32", "loss.kl_coef=0", "train.token_budget=60"]
    config = load_config(None, words)
    policy = CausalPolicy(config.model, Accelerator(cpu=True), temperature=1.0)
    assert policy.settle_attention() is None
    groups, advantages = ragged_groups()
    whole_scores = gradients(policy, config, groups, advantages)
    windows = []

    def forward(q, k, v, call, scale):
        windows.append(call.window)
        return KERNELS.forward(q, k, v, call, scale)

    kernels = KERNELS._replace(forward=forward)
    monkeypatch.setattr(packed.Layout, "kernels_for", lambda *_: kernels)
    found = gradients(policy, config, groups, advantages)
    assert {*windows} == ({5} if name == "mistral" else {5, None})
    assert found.keys() == whole_scores.keys()
    for at, gradient in whole_scores.items():
        assert (found[at] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, at
    assert name != "gpt_oss" or min(g.norm() for at, g in found.items() if at.endswith("sinks")) > 1e-6


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
    plan = VarlenPlan.of([(4, 6), (3,)], CPU)
    assert plan.own.queries.ends.tolist() == [0, 10, 13]
    assert not plan.crossings


def test_shared_prompts_are_the_only_columns_of_the_second_call():
    plan = VarlenPlan.of([(4, 6), (2, 1, 3)], CPU, may_join=False)
    assert plan.own.queries.ends.tolist() == [0, 10, 12, 13, 16]
    (second,) = plan.crossings
    assert second.seen_S.tolist() == [10, 11]
    assert second.asking_C.tolist() == [12, 13, 14, 15]
    assert (second.queries.ends.tolist(), second.queries.longest) == ([0, 4], 4)


def test_copied_keys_end_with_a_runs_own_and_are_left_out_where_they_are_too_many():
    plan = VarlenPlan.of([(4, 6), (2, 1, 0, 3)], CPU, branches=[[(range(13, 15), range(12, 13))]])
    assert plan.own.seen_S is not None and plan.own.queries.ends.tolist() == [0, 10, 12, 13, 13, 16]
    assert plan.own.keys.ends.tolist() == [0, 10, 12, 17, 17, 22]
    assert plan.own.seen_S.tolist()[10:] == [10, 11, 10, 11, 13, 14, 12, 10, 11, 13, 14, 15]
    assert VarlenPlan.of([(4, 6), (3,)], CPU).own.seen_S is None  # nothing is shared
    # 10 + 4 x 11 keys for 14 columns, and 10 + 4 x 15 for 30.
    assert VarlenPlan.of([(10, 1, 1, 1, 1)], CPU).own.seen_S is None
    assert VarlenPlan.of([(10, 5, 5, 5, 5)], CPU).own.seen_S is not None
    # In a window of 4 a run gets its own columns and 3 before them.
    windowed = VarlenPlan.of([(10, 1, 0, 5, 1, 1)], CPU, window=4).own
    assert windowed.keys.ends.tolist() == [0, 10, 14, 14, 22, 26, 30] and windowed.window == 4
    assert windowed.seen_S.tolist()[10:18] == [7, 8, 9, 10, 7, 8, 9, 11]
    assert VarlenPlan.of([(10, 1, 1, 1, 1)], CPU, window=10) is None  # 10 + 4 x 10 keys for 14 columns
    assert VarlenPlan.of([(10, 4), (3,)], CPU, window=4).own.seen_S is None


class Largest(TorchDispatchMode):
    """The most numbers that one tensor has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(x.numel() for x in (found,) if isinstance(x, torch.Tensor))])
        return found


@pytest.mark.parametrize("window", [None, 64])
def test_attention_of_a_tree_takes_memory_for_its_own_tokens(window):
    """20 rows of 10 tokens after contexts of 0, 30, ..., 570: 790 columns, rows of 6,300 tokens."""
    contexts = [list(range(30 * i)) for i in range(20)]
    branches = branches_of([(0, 0)] * 20, contexts)
    block = Block.of(0, 20, [len(context) + 10 for context in contexts], branches)
    layout = Layout((block,), CPU)
    assert (block.end, layout.longest) == (20 + 580 + 19 * 10, 600)
    _, *crossings = layout.varlen().crossings  # of 18 branches that share 30 to 540 tokens, 5,130 in all
    assert sum(len(x.queries.ends) - 1 for x in crossings) == 18
    assert sorted(len(x.seen_S) for x in crossings)[-1] <= 790
    assert sum(len(x.seen_S) for x in crossings) == 5130
    q, k, v = torch.randn(3, 1, 2, block.end, 8, requires_grad=True).unbind()
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with Largest() as largest, saved_tensors_hooks(keep, lambda x: x):
        out, _ = packed_attention(
            torch.nn.Module(), q, k, v, None, sliding_window=window, cohort_layout=layout
        )
        out.square().sum().backward()
    assert largest.numbers <= 2 * 580 * 600  # scores of the longest row in 2 heads
    assert sum(kept.values()) <= 10 * q.nbytes  # keys and values of all rows are 16 times as much as q


def test_dropout_is_refused():
    x = torch.randn(1, 1, 3, 4)
    with pytest.raises(ValueError, match="Identity applies dropout although it is not in training"):
        layout = Layout((Block(0, 2, (1,)),), CPU)
        packed_attention(torch.nn.Identity(), x, x, x, None, dropout=0.1, cohort_layout=layout)
