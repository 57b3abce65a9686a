"""What a plan knows of the host's memory: what is free there, and what a run would pin."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
from transformers import Qwen2Config

from recipes.fit import refusal, said_host
from rl.config.read import load_config, replaced
from rl.plan.host import check_host, free_bytes, host_share, pinned
from rl.plan.memory import GIB, Card
from rl.plan.search import fit
from rl.plan.sizes import ModelSize
from tests.bench.workload import SHAPES

LAYERS = {"hidden_size": 8, "intermediate_size": 20, "num_hidden_layers": 2, "tie_word_embeddings": True}
LARGE = ModelSize.of(
    Qwen2Config(**SHAPES["7b"], num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False),
    fused_layers=True,
)
NOTHING_SET = ["loss.kl_coef=0.001", "data.max_prompt_length=1024", "sampling.max_completion_length=1024"]
MOMENTS, REFERENCE = "memory.optimizer_on_host", "memory.reference_on_host"


def test_pinned_bytes_are_those_by_hand():
    """Two fp32 moments of each weight; the layers' matrices in bf16, or in fp32 if the reference moves."""
    small = Qwen2Config(**LAYERS | {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 100})
    size = ModelSize.of(small, fused_layers=True)
    # q and o 8x8, k and v 8x4, gate, up and down 8x20; biases 8, 4, 4; norms; the embedding, also the head.
    linear = 2 * (2 * 64 + 2 * 32 + 3 * 160)
    weights = linear + 2 * (8 + 4 + 4 + 2 * 8) + 8 + 800
    config = load_config(None, ["loss.kl_coef=0.1"])
    assert pinned(size, config) == 0
    assert pinned(size, replaced(config, {MOMENTS: True})) == 8 * weights
    both = replaced(config, {MOMENTS: True, REFERENCE: True})
    assert pinned(size, both) == 8 * weights + 2 * linear
    moving = replaced(both, {"model.reference.update_every": 2})
    assert pinned(size, moving) == 8 * weights + 4 * linear


def test_a_plan_pins_no_more_than_the_host_has():
    """7.6e9 weights with KL on a GPU of 100 GiB fit only if their moments, 8 bytes each, leave it."""
    config = load_config(None, NOTHING_SET)
    for host in (None, 57 * GIB, 56 * GIB):
        values = fit(LARGE, config, Card("a GPU", 100 * GIB, host=host), 2048)
        assert (values is None) == (host == 56 * GIB)
        if values is not None:
            assert values[MOMENTS] is True and REFERENCE not in values
            assert 56.7 < pinned(LARGE, replaced(config, values)) / GIB < 56.8
    said = refusal(LARGE, config, Card("a GPU", 100 * GIB, host=56 * GIB))
    assert (
        "100 GiB with 56.0 GiB of host memory for each process; with 56.7 it would (memory.host_gib)" in said
    )
    assert said.endswith("it does with: model.lora='{r: 16}'")


def test_what_is_given_beyond_the_hosts_memory_is_refused():
    given = load_config(None, [*NOTHING_SET, f"{MOMENTS}=true"])
    check_host(LARGE, given, None)
    check_host(LARGE, given, 57 * GIB)
    with pytest.raises(ValueError, match=r"would keep 56\.7 GiB .* may take 50\.0; .* set memory\.host_gib"):
        check_host(LARGE, given, 50 * GIB)
    assert (
        said_host(3 * GIB, 10 * GIB) == "; each process pins 3.0 GiB of host memory of 10.0 that it may take"
    )


def test_processes_of_a_host_share_what_is_given_or_free():
    config = load_config(None, [*NOTHING_SET, "memory.host_gib=64"])
    assert host_share(config, 4) == 16 * GIB
    free = host_share(load_config(None, NOTHING_SET), 2)
    assert 0 < free <= psutil.virtual_memory().available * 0.9 / 2 + GIB


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_control_group_decides(version: int, tmp_path: Path):
    """A group of 1,000 bytes with 700 in use, 100 of them pages of files; below it one without a limit."""
    limit, used, pages = (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    )[2 - version]
    top = tmp_path / "memory" if version == 1 else tmp_path
    inner = top / "slice" / "job"
    inner.mkdir(parents=True)
    (inner / limit).write_text("max\n" if version == 2 else f"{2**62}\n")
    (inner.parent / limit).write_text("1000\n")
    for folder in (inner, inner.parent):
        (folder / used).write_text("700\n")
        (folder / "memory.stat").write_text(f"cache 5\n{pages} 100\n")
    proc = tmp_path / "cgroup"
    proc.write_text("3:cpu,cpuacct:/other\n4:memory:/slice/job\n" if version == 1 else "0::/slice/job\n")
    assert free_bytes(proc, tmp_path) == 400
    (inner.parent / "memory.stat").unlink()  # some sandboxes have none
    assert free_bytes(proc, tmp_path) == 300
    (inner.parent / limit).unlink()
    assert free_bytes(proc, tmp_path) > 2**20
