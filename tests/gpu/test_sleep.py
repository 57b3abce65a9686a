"""On one GPU: a vLLM that sleeps gives its memory back, and samples afterwards as if it never had slept.

python -m pytest tests/gpu/test_sleep.py -s
"""

from __future__ import annotations

import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl.types import Prompt, SamplingParams
from rollout.engine import EngineError
from rollout.weight_sync import publish
from tests.bench.workload import Workload, write_model
from tests.calling import call
from tests.vllm_engines import needs_vllm, start_vllm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    needs_vllm,
]
GIB = 2**30
SHARE, LENGTH = 0.3, 96
IDS = [(i * 37 + 5) % 30000 for i in range(48)]
PROMPTS = [
    Prompt(str(k), "", tuple((7 * k + 11 * i + 3) % 30000 for i in range(20 + 9 * k))) for k in range(4)
]


def free_gib() -> float:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] / GIB


class Weights:
    """A model in bf16 as a stream."""

    def __init__(self, folder, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
        if seed:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    if parameter.ndim > 1:
                        parameter.normal_(0, 0.02)

    def __iter__(self):
        return iter([(name, p.detach()) for name, p in self.model.named_parameters()])

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        logits = self.model(torch.tensor([ids], device="cuda")).logits[0, :-1].float()
        return logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:], device="cuda")[:, None])[:, 0]

    def canary(self):
        return IDS, self.logprobs(IDS).tolist()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), Workload(shape="0.5b"))


@pytest.fixture(scope="module")
def streams(folder):
    return Weights(folder, 0), Weights(folder, 1)


@pytest.fixture(scope="module")
def engine(folder, streams):
    """With CUDA graphs, as a run has them."""
    before = free_gib()
    options = {
        "dtype": torch.bfloat16,
        "max_model_len": 1024,
        "gpu_memory_utilization": SHARE,
        "max_num_seqs": 64,
    }
    engine = start_vllm(folder, AutoTokenizer.from_pretrained(folder), process="own", sleeps=True, **options)
    print(f"the engine took {before - free_gib():.1f} GiB at its start")
    yield engine
    engine.close()


def alone(engine) -> list[tuple[list[int], list[float]]]:
    """A completion of each prompt, one at a time: equal batches in both runs."""
    found = []
    for k, prompt in enumerate(PROMPTS):
        asked = call([prompt], num_completions=1, sampling=SamplingParams(LENGTH), seeds=[k])
        (c,) = engine.generate(asked)[0].completions
        found.append((c.token_ids, c.behavior_logprobs))
    return found


def test_sleep_gives_back_weights_and_cache_and_waking_takes_them_part_by_part(engine, streams):
    engine.hold(release=True)  # as a run that goes on: before its first weights, which vLLM's reload takes
    publish(engine, streams[0], version=0)
    total = torch.cuda.mem_get_info()[1] / GIB
    awake, began = free_gib(), time.perf_counter()
    engine.hold(release=True)
    slept, asleep = time.perf_counter() - began, free_gib()
    held = torch.empty(int((asleep - 2) * GIB), dtype=torch.uint8, device="cuda").fill_(7)  # the trainer's
    assert int(held[-1]) == 7
    del held
    free_gib()
    engine._core.wake("weights")
    with_weights = free_gib()
    engine._core.wake("cache")
    back = free_gib()
    print(
        f"free of {total:.1f} GiB: awake {awake:.2f}, asleep {asleep:.2f}, weights awake {with_weights:.2f}, "
        f"all awake {back:.2f}; asleep it keeps {SHARE * total - (asleep - awake):.2f} of its share of "
        f"{SHARE * total:.2f}; fell asleep in {slept:.3f} s"
    )
    weights = sum(h.num_bytes for h in engine.tensors.values()) / GIB
    assert asleep - awake > SHARE * total - 4  # what it has for itself: context, graphs, workspaces
    assert 0.8 * weights < asleep - with_weights < 1.5 * weights + 0.5
    assert abs(back - awake) < 0.6
    publish(engine, streams[0], version=1)


def test_after_sleep_and_sync_it_samples_as_if_it_never_had_slept(engine, streams):
    publish(engine, streams[0], version=2)
    expected, canary = alone(engine), engine.prompt_logprobs(IDS)
    for version in range(3, 7):
        engine.hold(release=True)
        with pytest.raises(EngineError, match="sleeps and cannot sample"):
            alone(engine)
        began = time.perf_counter()
        report = publish(engine, streams[0], version=version)
        print(f"woke and synced in {time.perf_counter() - began:.3f} s: {dict(report.parts)}")
        assert engine.prompt_logprobs(IDS) == canary
        found = alone(engine)
        same = [a[0] == b[0] for a, b in zip(found, expected, strict=True)]
        gap = max(
            abs(x - y) for a, b in zip(found, expected, strict=True) for x, y in zip(a[1], b[1], strict=False)
        )
        print({"same tokens": same, "greatest gap of log-probs": gap})
        assert all(same) and gap < 1e-3


def test_completions_in_flight_go_on_with_the_new_weights(engine, streams):
    old, new = streams
    publish(engine, old, version=10)
    engine.submit(call(PROMPTS, num_completions=8, sampling=SamplingParams(800), seeds=range(4)))
    engine.collect(timeout_s=0.7)
    engine.hold()
    engine.hold(release=True)
    asleep = free_gib()
    began = time.perf_counter()
    publish(engine, new, version=11)
    print(
        f"{asleep:.1f} GiB free, {engine.in_flight} in flight; synced in {time.perf_counter() - began:.3f} s"
    )
    groups = []
    while engine.in_flight:
        groups += engine.collect(timeout_s=120.0)
    gaps: dict[str, list[torch.Tensor]] = {"old": [], "new": [], "wrong": []}
    for group in groups:
        for c in group.completions:
            assert len(c.token_ids) == 800 == sum(s.num_tokens for s in c.version_spans)
            if len(c.version_spans) < 2:
                continue
            first, second = c.version_spans
            assert (first.policy_version, second.policy_version) == (10, 11)
            ids, n, k = [*group.prompt.token_ids, *c.token_ids], len(group.prompt.token_ids), first.num_tokens
            sampled = torch.tensor(c.behavior_logprobs, device="cuda")
            before, after = (stream.logprobs(ids)[n - 1 :] for stream in streams)
            gaps["old"].append((sampled - before)[:k].abs())
            gaps["new"].append((sampled - after)[k:].abs())
            gaps["wrong"].append((sampled - before)[k:].abs())
    means = {name: torch.cat(found).mean().item() for name, found in gaps.items()}
    print({"interrupted": len(gaps["new"]), **means})
    assert len(gaps["new"]) >= 16
    assert means["old"] < 0.05 and means["new"] < 0.05 < 0.2 < means["wrong"]
    assert engine.version == 11
