"""A random Llama that every engine can load, its tokenizer, and streams of its weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rl.types import Group, Prompt
from rollout.engine import Engine

END = 2
CANARY = [(i * 37 + 5) % 300 for i in range(24)]


def make_model(seed: int, *, vocab_size: int = 300, layers: int = 2, tie: bool = True) -> LlamaForCausalLM:
    """Heads of 32, for which vLLM's CPU attention has a kernel; weights so large that log-probs differ."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
        initializer_range=0.1,
        eos_token_id=None,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def save(model: LlamaForCausalLM, folder: Path) -> Path:
    """A model folder whose own generation settings no engine may follow: sampling is what the caller says."""
    model.save_pretrained(folder)
    own = {"do_sample": True, "temperature": 0.2, "top_k": 3, "repetition_penalty": 2.0, "eos_token_id": 7}
    (folder / "generation_config.json").write_text(json.dumps(own))
    return folder


def make_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{END}")


def make_prompts(*lengths: int) -> list[Prompt]:
    """Prompts of these lengths, all different."""
    return [
        Prompt(f"tiny/{k}", "", tuple((7 * k + 11 * i + 3) % 290 + 5 for i in range(n)))
        for k, n in enumerate(lengths)
    ]


@torch.no_grad()
def token_logprobs(model: LlamaForCausalLM, ids: list[int], temperature: float = 1.0) -> list[float]:
    """log p(ids[i] | ids[:i]) for i >= 1 by one forward of transformers."""
    logits = model(torch.tensor([ids])).logits[0, :-1].float() / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


def largest_gap(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def collect_all(engine: Engine) -> list[Group]:
    groups: list[Group] = []
    while engine.in_flight:
        groups += engine.collect(timeout_s=60.0)
    return groups


def largest_gap_to(models: Mapping[int, torch.nn.Module], group: Group) -> float:
    """Between the log-probs of a group and transformers' own, with the weights that its spans name."""
    worst, prompt_ids = 0.0, group.prompt.token_ids
    for c in group.completions:
        versions = [span.policy_version for span in c.version_spans for _ in range(span.num_tokens)]
        own = {v: token_logprobs(models[v], [*prompt_ids, *c.token_ids]) for v in set(versions)}  # type: ignore[arg-type]
        pairs = zip(c.behavior_logprobs, versions, strict=True)
        gaps = [abs(a - own[v][len(prompt_ids) - 1 + t]) for t, (a, v) in enumerate(pairs)]
        worst = max([worst, *gaps])
    return worst


class Stream:
    """A WeightStream of a model; `passes` changes what the n-th pass yields (the first is inspected)."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        passes: dict[int, Callable[[dict[str, Tensor]], dict[str, Tensor]]] | None = None,
    ) -> None:
        self.model, self.passes, self.count = model, passes or {}, 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.count += 1
        change = self.passes.get(self.count, lambda tensors: tensors)
        tensors = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        return iter(change(tensors).items())

    def canary(self) -> tuple[list[int], list[float]]:
        return CANARY, token_logprobs(self.model, CANARY)


def changed(model: torch.nn.Module, share: float = 0.01) -> torch.nn.Module:
    """The model after a step that moved a share of its values, some in every tensor."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            moved = torch.rand(parameter.shape, generator=generator) < share
            moved.view(-1)[-1] = True
            parameter.add_(moved * 0.05)
    return model
