"""Every trained tensor of every family is in the weight stream: alone it moves one tensor of it, and with
adapters the stream is peft's own merge. What cannot be is refused by name.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rl.model.adapters import unsent
from rl.weights import check_streamed
from tests.rl.families import ALWAYS, FAMILIES, NO_LORA, REFUSED, load

NAMES = [n for n in FAMILIES if n not in REFUSED]
PARAMETERS = [pytest.param(n, marks=[] if n in ALWAYS else [pytest.mark.rotation]) for n in NAMES]
ADAPTER = "model.lora={r: 2, alpha: 4}"


def stream(policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.weights()}


def moved_alone(policy) -> dict[str, list[str]]:
    """Trained tensor -> tensors of the stream that change with it, the others being as they were."""
    found, generator = {}, torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.trainable():
            if "lora_B" in name:  # at 0 a change of A changes nothing
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        before = stream(policy)
        for name, parameter in policy.trainable():
            kept = parameter.clone()
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            found[name] = [n for n, t in stream(policy).items() if not torch.equal(t, before[n])]
            parameter.copy_(kept)
    return found


def streams_its_merge(policy) -> None:
    merged = dict(copy.deepcopy(policy.peft_model).merge_and_unload().named_parameters())
    sent = stream(policy)
    assert merged.keys() <= sent.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(sent[name], tensor, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_trained_weight_moves_its_own_tensor_of_the_stream(name, tiny_model_dir, tmp_path):
    policy, _ = load(name, tmp_path, tiny_model_dir)
    assert moved_alone(policy) == {n: [n] for n, _ in policy.trainable()}


@pytest.mark.parametrize("name", PARAMETERS)
def test_all_adapters_are_in_the_stream_as_peft_merges_them(name, tiny_model_dir, tmp_path):
    if name in NO_LORA:
        with pytest.raises(ValueError, match=r"model\.lora\.target_modules"):
            load(name, tmp_path, tiny_model_dir, ADAPTER)
        return
    policy, _ = load(name, tmp_path, tiny_model_dir, ADAPTER)
    assert {len(moved) for moved in moved_alone(policy).values()} == {1}
    streams_its_merge(policy)


@pytest.mark.parametrize("name", PARAMETERS)
def test_adapters_of_chosen_modules_are_in_the_stream_as_peft_merges_them(name, tiny_model_dir, tmp_path):
    """Targets: the first and the last linear layer below the head, by the ends of their names."""
    policy, _ = load(name, tmp_path, tiny_model_dir)
    head = policy.model.get_output_embeddings()
    ends = [
        n.split(".")[-1] for n, m in policy.model.named_modules() if type(m) is nn.Linear and m is not head
    ]
    if not ends:
        pytest.skip("no linear layer")
    chosen = sorted({ends[0], ends[-1]})
    try:
        policy, _ = load(
            name, tmp_path, tiny_model_dir, f"model.lora={{r: 2, alpha: 4, target_modules: {chosen}}}"
        )
    except ValueError as refusal:
        assert "model.lora.target_modules=" in str(refusal)
        return
    assert {len(moved) for moved in moved_alone(policy).values()} == {1}
    streams_its_merge(policy)


def test_a_run_whose_adapter_has_no_delta_to_stream_is_refused_by_name(tiny_model_dir, tmp_path, monkeypatch):
    """As peft of an older version, whose adapter of one expert matrix never reached the engine."""
    from peft.tuners.lora.layer import ParamWrapper

    policy, _ = load("qwen3_moe", tmp_path, tiny_model_dir, ADAPTER)
    assert unsent(policy.model) == []
    check_streamed(policy.model)
    monkeypatch.setattr(ParamWrapper, "get_delta_weight", lambda self, adapter: torch.zeros(3, 3))
    with pytest.raises(
        ValueError, match=r"mlp\.experts\..*lora_A.* would be trained but not reach the engine"
    ):
        check_streamed(policy.model)
