"""Laws 1 and 2 over processes: two gloo ranks step along the gradient of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.diffusion.processes import launch

SCRIPT = Path(__file__).with_name("two_processes.py")


def test_gradient_does_not_depend_on_the_number_of_processes(tiny_model_dir, ragged_groups, tmp_path):
    """The second rank holds longer completions and, in its first half, only rows without signal."""
    groups, advantages = ragged_groups(num_groups=6)
    advantages[1] = [0.0] * len(advantages[1])
    rows = [
        [list(g.prompt.token_ids), [[c.token_ids, c.behavior_logprobs] for c in g.completions], a]
        for g, a in zip(groups, advantages, strict=True)
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    arguments = [str(tiny_model_dir), str(tmp_path / "data.json"), str(tmp_path), "grpo,dapo"]
    launch(SCRIPT, arguments, 1)
    launch(SCRIPT, arguments, 2)
    for loss in ("grpo", "dapo"):
        compare(tmp_path, loss)


def compare(folder: Path, loss: str) -> None:
    one = load_file(folder / f"{loss}-rank0of1.safetensors")
    for rank in (0, 1):
        two = load_file(folder / f"{loss}-rank{rank}of2.safetensors")
        assert one.keys() == two.keys()
        difference = sum((one[n] - two[n]).double().square().sum() for n in one) ** 0.5
        size = sum(one[n].double().square().sum() for n in one) ** 0.5
        assert size > 1e-3 and (difference / size).item() <= 1e-5
    files = [f"{loss}-{name}.json" for name in ("rank0of1", "rank0of2", "rank1of2")]
    metrics = [json.loads((folder / f).read_text()) for f in files]
    for name in metrics[0].keys() - {"memory/peak"}:  # each process has its own
        expected = pytest.approx(metrics[0][name], rel=1e-4, abs=1e-5)
        assert metrics[1][name] == metrics[2][name] == expected, name
