"""A vLLM server without our worker extension: what its own routes and the canary see of wrong weights.

This is why such a server is refused. The numbers are in recipes/SEVERAL_HOSTS.md.
"""

import math
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import save_file
from sync_faults import DOWN, FAULTS, Q0
from tiny_llama import CANARY, make_model, save, token_logprobs

from rollout.vllm.lock import LOCK, RECEIVER, make_token, read_token
from rollout.vllm.member import connect
from tests.vllm_engines import needs_vllm
from tests.vllm_servers import ServerProcess

pytestmark = [needs_vllm, pytest.mark.rotation, pytest.mark.timeout(600)]
EMBED = "model.embed_tokens.weight"


def with_factor(name, factor, at=slice(None)):
    def change(tensors):
        scaled = tensors[name].clone()
        scaled[at] *= factor
        return tensors | {name: scaled}

    return change


MUTATIONS = {fault.__name__: fault for fault in FAULTS} | {
    "scaled by 1.001": with_factor(DOWN, 1.001),
    "one row doubled": with_factor(Q0, 2.0, 3),
}
MISSED = {  # of `MUTATIONS`, by the limits of the mean in float32 and in bfloat16
    0.0025: {"scaled by 1.001"},
    0.2: {"scaled by 1.001", "one row doubled", "lora_missing", "lora_twice", "transposed_rows"},
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder: Path = tmp_path_factory.mktemp("stock")
    make_token(folder / "token")
    model = save(make_model(0), folder / "model")
    started = ServerProcess(model, folder / "token", folder / "server.log", extension=False, has_lock=False)
    try:
        yield started.wait()
    finally:
        started.kill()


def test_it_is_refused_with_the_option_that_it_lacks(stock: ServerProcess):
    token = read_token(stock.log.parent / "token")
    own = (
        f"--worker-extension-cls {RECEIVER}, for weights and their proof; --middleware {LOCK}, for its token"
    )
    with pytest.raises(ValueError, match=f"server {stock.url} lacks {own} and what it has sampled: start it"):
        connect(stock.url, token, dtype=torch.float32, max_model_len=128, timeout_s=60.0)


def test_its_answers_checksums_and_canary_miss_wrong_weights(stock: ServerProcess):
    """Every push is answered with 200. The checksums of packed layers are those of no bytes."""
    policy, folder = make_model(1), stock.log.parent / "pushed"
    own = {name: parameter.detach() for name, parameter in policy.named_parameters()}
    expected = token_logprobs(policy, CANARY)
    token = read_token(stock.log.parent / "token")
    with httpx.Client(
        base_url=stock.url, headers={"Authorization": f"Bearer {token}"}, timeout=60.0, trust_env=False
    ) as client:

        def asked(path, **body):
            reply = client.post(path, json=body)
            assert reply.status_code == 200, reply.text
            return reply.json()

        def canary(salt):
            """The mean gap in nats. A tensor that no push filled may be NaN, which vLLM does not send."""
            sampling = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}
            body = {"token_ids": CANARY, "sampling_params": sampling, "cache_salt": salt}
            reply = client.post("/inference/v1/generate", json=body)
            if reply.status_code == 400 and "Out of range float" in reply.text:
                return math.inf
            assert reply.status_code == 200, reply.text
            given = reply.json()["prompt_logprobs"]
            found = [at[str(t)]["logprob"] for at, t in zip(given[1:], CANARY[1:], strict=True)]
            return statistics.mean(abs(a - b) for a, b in zip(found, expected, strict=True))

        def pushed(tensors, salt):
            """Checksums after a reload, and the mean gap of the canary in nats."""
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(stock.log.parent / "model", folder)
            whole = tensors | {"lm_head.weight": own[EMBED].clone()}
            save_file(
                {k: v.contiguous() for k, v in whole.items()}, folder / "model.safetensors", {"format": "pt"}
            )
            asked("/collective_rpc", method="reload_weights", kwargs={"weights_path": str(folder)})
            gap = canary(salt)
            return asked("/weight_checker", action="checksum")["checksums"], gap

        assert pushed({name: t * torch.nan for name, t in own.items()}, "not a number")[1] == math.inf
        right, gap = pushed(own, "right")
        assert gap < 1e-5
        gaps, same = {}, set()
        for name, change in MUTATIONS.items():
            pushed(own, f"before {name}")
            sums, gaps[name] = pushed(change(own), name)
            same |= {name} if sums == right else set()
    print({name: f"{gap:.2g}" for name, gap in gaps.items()})
    assert same == MUTATIONS.keys()
    for limit, missed in MISSED.items():
        assert {name for name, gap in gaps.items() if gap <= limit} == missed
