"""The Engine of masked diffusion models: groups from the sampler, each completion with its commit order."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from rl.types import Call, Completion, SamplingParams
from rollout.calls import Sampled, aborted, completion, decode_texts, prompt_faults, version_spans
from rollout.diffusion.denoise import Denoised, denoise, prompt_canvas
from rollout.diffusion.graph import GraphedDenoiser
from rollout.diffusion.model import Denoiser, Layout, TransformersDenoiser
from rollout.diffusion.steps import DenoisingParams
from rollout.in_process import InProcessEngine
from rollout.sampler import completion_seed


class DiffusionEngine(InProcessEngine):
    """The sampler behind the Engine protocol, on its own copy of the model.

    A call's `max_completion_length`, temperature and end ids replace those of `settings`; the steps per block
    stay. `behavior_logprobs` are those of the tokens at the steps that committed them.

    `facts["trace"]` of a completion says in which order its canvas was written. `steps` has the step (from 0)
    that committed each column's token, or `num_steps` where none did. `num_steps` counts the row's model
    calls. `tail_ids` are the ids after the completion, the mask token where none was committed. `pieces` are
    the texts of the completion's tokens.

    Args:
        model: a diffusion model of transformers: its config names the mask token.
        tokenizer: turns tokens into text and is used for nothing else.
        settings: how canvases are filled.
        max_num_seqs: canvases in one model call.
        timeout_s: longest wait for one `generate` call.
        graphs: capture CUDA graphs where the model is on a GPU.
    """

    name = "diffusion"

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: DenoisingParams,
        *,
        max_num_seqs: int = 64,
        timeout_s: float = 600.0,
        graphs: bool = True,
    ) -> None:
        super().__init__(model, tokenizer, max_num_seqs=max_num_seqs, timeout_s=timeout_s)
        self.settings = settings
        self.plain = TransformersDenoiser(model)
        on_gpu = self.plain.device.type == "cuda"
        self.denoiser: Denoiser = GraphedDenoiser(self.plain) if graphs and on_gpu else self.plain
        self._piece = cache(lambda token: self.tokenizer.decode([token]))

    def _sampled(self, call: Call, deadline: float) -> Sampled:
        prompts, params = call.prompts, self._params(call.sampling)
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        room, mask = self.denoiser.context_length, self.denoiser.mask_token_id
        faults = prompt_faults(prompts, call.sampling, vocab_size=vocabulary, room=room)
        for i, prompt in enumerate(prompts):
            if mask in prompt.token_ids:  # it would be filled in
                faults.setdefault(i, f"prompt {prompt.id} contains the mask token (id {mask})")
        rows = [(i, g) for i in range(len(prompts)) if i not in faults for g in range(call.num_completions)]
        found = denoise(
            self.denoiser,
            [prompt_canvas(prompts[i].token_ids, params, mask) for i, _ in rows],
            params,
            seeds=[completion_seed(call.seeds[i], g) for i, g in rows],
            max_rows=self.max_num_seqs,
            deadline=deadline,
        )
        done = {
            (i, g): self._completion(row, len(prompts[i].token_ids), call.with_logprobs)
            for (i, g), row in zip(rows, found, strict=True)
        }
        decode_texts(self.tokenizer, list(done.values()))
        return done, faults

    @torch.no_grad()
    def prompt_logprobs(self, token_ids: list[int]) -> list[float]:
        """log p(ids[i] | ids[0] and masks) for i >= 1: the canary of a weight sync."""
        canvas = torch.full((len(token_ids),), self.plain.mask_token_id, device=self.plain.device)
        canvas[0] = token_ids[0]
        layout = Layout.of([(0, len(token_ids))], [len(token_ids)], device=self.plain.device)
        hidden_ND = self.plain.hidden(canvas, layout)
        wanted = hidden_ND[:-1] if self.plain.shift else hidden_ND[1:]
        targets = torch.tensor(token_ids[1:], device=self.plain.device)
        return self.plain.logits(wanted).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0].tolist()

    def _params(self, sampling: SamplingParams) -> DenoisingParams:
        if sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0:
            raise ValueError(
                f"top_p={sampling.top_p:g}, top_k={sampling.top_k}, min_p={sampling.min_p:g}: the diffusion "
                "sampler draws from the whole distribution; use top_p=1.0, top_k=0, min_p=0.0"
            )
        length, block = sampling.max_completion_length, self.settings.block_length
        return replace(
            self.settings,
            gen_length=length,
            steps=self.settings.steps_per_block * (length // block) if length % block == 0 else None,
            temperature=sampling.temperature,
            stop_token_ids=tuple(sampling.stop_token_ids),
        )

    def _completion(self, row: Denoised | None, start: int, with_logprobs: bool) -> Completion:
        """A completion without its text."""
        if row is None or not row.finite:
            return aborted()
        ids = row.token_ids[start : row.end]
        logprobs = row.logprobs[start : row.end] if with_logprobs else []
        spans = version_spans([self.version], [len(ids)])
        found = completion(ids, logprobs, "stop" if row.stopped else "length", spans)
        trace = {
            "steps": row.commit_steps[start:],
            "tail_ids": row.token_ids[row.end :],
            "num_steps": row.num_steps,
            "pieces": [self._piece(token) for token in ids],
        }
        found.facts = {"trace": trace}
        return found
