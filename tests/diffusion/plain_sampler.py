"""The sampling algorithm of the LLaDA paper (arXiv:2502.09992, Algorithms 4 and 5, with the
semi-autoregressive blocks of section 2.4 and classifier-free guidance), as plainly as it is printed: padded
batch, the whole row's logits at every step, every step of every block.
"""

from __future__ import annotations

import torch
from torch import Tensor


def full_attention_logits(model, ids_BT: Tensor, real_BT: Tensor) -> Tensor:
    """A stock transformers decoder under an explicit 4-D mask: every real column sees every real column."""
    mask = real_BT[:, None, None, :].expand(-1, 1, ids_BT.shape[1], -1)
    return model(input_ids=ids_BT, attention_mask=mask, use_cache=False).logits


@torch.no_grad()
def plain_generate(
    model,
    prompts: list[list[int]],
    *,
    mask_id: int,
    gen_length: int,
    block_length: int,
    steps: int,
    cfg_scale: float = 0.0,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    confidence_dtype: torch.dtype = torch.float64,
) -> Tensor:
    """[B, gen_length] completions of left-padded prompts by low-confidence remasking.

    Every row of a block has the same number of masks, so one top-k serves the whole batch.
    """
    device = next(model.parameters()).device
    width = max(map(len, prompts))
    x = torch.full((len(prompts), width + gen_length), mask_id, device=device)
    real = torch.zeros_like(x, dtype=torch.bool)
    for b, prompt in enumerate(prompts):
        x[b, width - len(prompt) : width] = torch.tensor(prompt, device=device)
        real[b, width - len(prompt) :] = True
    given = real & (x != mask_id)
    num_blocks = gen_length // block_length
    steps_per_block = steps // num_blocks
    for block in range(num_blocks):
        start = width + block * block_length
        end = start + block_length
        for step in range(steps_per_block):
            masked = x == mask_id
            logits = full_attention_logits(model, x, real)
            if cfg_scale:
                blind = full_attention_logits(model, torch.where(given, mask_id, x), real)
                logits = blind + (cfg_scale + 1) * (logits - blind)
            logits[..., mask_id] = -torch.inf  # p(M) = 0: the model of the paper never predicts a mask
            noisy = logits
            if temperature:
                noise = torch.rand(logits.shape, dtype=torch.float64, generator=generator, device=device)
                noisy = logits.double().exp() / (-noise.log()) ** temperature
            x0 = noisy.argmax(-1)
            confidence = logits.to(confidence_dtype).softmax(-1).gather(-1, x0[..., None]).squeeze(-1)
            confidence = torch.where(masked, confidence, -torch.inf)
            confidence[:, :start] = -torch.inf
            confidence[:, end:] = -torch.inf
            count = block_length // steps_per_block + (step < block_length % steps_per_block)
            best = confidence.topk(count, dim=1).indices
            x.scatter_(1, best, x0.gather(1, best))
    return x[:, width:]
