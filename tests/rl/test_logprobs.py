"""Chunked log-probs and entropies equal plain autograd through full logits, gradients included."""

from __future__ import annotations

import pytest
import torch

import rl.model.head
from rl.model.head import token_logprobs


@pytest.mark.parametrize("rows", [3, 1000])
@pytest.mark.parametrize(
    ("temperature", "scale", "softcap", "bias"),
    [(1.0, 1.0, None, False), (0.7, 1.0, None, True), (1.3, 0.5, 5.0, False)],
)
def test_values_and_gradients_equal_full_logits(monkeypatch, rows, temperature, scale, softcap, bias):
    monkeypatch.setattr(rl.model.head, "_chunk_rows", lambda *_: rows)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, offset = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((11, 6), (17, 6), (17,))
    )
    targets = torch.randint(0, 17, (11,), generator=generator)
    upstream = torch.randn(2, 11, generator=generator, dtype=torch.float64)
    leaves = [hidden, weight, *([offset] if bias else [])]

    logits = (hidden @ weight.T + (offset if bias else 0)) * scale
    logits = (softcap * torch.tanh(logits / softcap) if softcap else logits) / temperature
    all_logprobs = torch.log_softmax(logits, -1)
    expected = (
        all_logprobs.gather(-1, targets[:, None]).squeeze(-1),
        -(all_logprobs.exp() * all_logprobs).sum(-1),
    )
    wanted = torch.autograd.grad((torch.stack(expected) * upstream).sum(), leaves)

    ours = token_logprobs(
        hidden,
        targets,
        weight_VD=weight,
        bias_V=offset if bias else None,
        temperature=temperature,
        logit_scale=scale,
        softcap=softcap,
    )
    got = torch.autograd.grad((torch.stack(ours) * upstream).sum(), leaves)
    for a, b in zip((*expected, *wanted), (*ours, *got), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_logits_change_no_bit_and_spare_the_second_product(monkeypatch, dtype, softcap):
    monkeypatch.setattr(rl.model.head, "_chunk_rows", lambda *_: 4)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=generator).to(dtype).requires_grad_() for n in (11, 17))
    targets = torch.randint(0, 17, (11,), generator=generator)
    plain, products = rl.model.head._Head.product, []
    monkeypatch.setattr(
        rl.model.head._Head, "product", lambda head, rows: (products.append(len(rows)), plain(head, rows))[1]
    )

    def passes(keep: bool, again: int = 1) -> list[torch.Tensor]:
        found = token_logprobs(hidden, targets, weight_VD=weight, softcap=softcap, keep=keep)
        loss = (found[0] + 0.1 * found[1]).sum()
        grads = [torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(again)]
        return [*found, *sum(grads, ())]

    twice = passes(keep=False)
    assert products == [4, 4, 3] * 2
    products.clear()
    for found, expected in zip(passes(keep=True), twice, strict=True):
        assert torch.equal(found, expected)
    assert products == [4, 4, 3]
    # A second backward pass, for which nothing is left, computes them.
    *_, first, more, second, again = passes(keep=True, again=2)
    assert torch.equal(first, second) and torch.equal(more, again)
    with torch.no_grad():  # nothing is held for a pass that will never come
        assert token_logprobs(hidden, targets, weight_VD=weight, keep=True)[0].grad_fn is None


def test_a_token_of_zero_probability_gives_no_nan():
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[1e5], [0.0]])
    logprobs, entropy = token_logprobs(hidden, torch.tensor([0]), weight_VD=weight)
    (logprobs.sum() + entropy.sum()).backward()
    assert logprobs.item() == 0.0 and entropy.item() == 0.0 and torch.isfinite(hidden.grad).all()


def test_autocast_changes_neither_pass():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 8, generator=generator, requires_grad=True)
    weight = torch.randn(300, 8, generator=generator, requires_grad=True)
    targets = torch.tensor([0, 7, 299, 12, 3])
    plain = token_logprobs(hidden, targets, weight_VD=weight)
    wanted = torch.autograd.grad(plain[0].sum() + plain[1].sum(), (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        found = token_logprobs(hidden, targets, weight_VD=weight)
    got = torch.autograd.grad(found[0].sum() + found[1].sum(), (hidden, weight))
    for a, b in zip((*plain, *wanted), (*found, *got), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
