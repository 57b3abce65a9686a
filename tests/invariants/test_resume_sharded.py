"""Law 6 with two processes that split the weights: killed anywhere, a run ends like an undisturbed one."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.invariants.resume_laws import (  # noqa: F401
    NAMES,
    STEPS,
    kill_and_resume,
    tensors,
    test_every_prompt_is_consumed_once_and_in_the_same_order,
    test_metrics_have_neither_gaps_nor_doubles,
    test_two_checkpoints_are_kept_and_load_as_plain_models,
    test_weights_and_optimizer_are_bitwise_those_of_an_undisturbed_run,
)

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def runs(request, tiny_model_dir, tmp_path_factory) -> tuple[Path, dict[str, list[int]]]:
    out = tmp_path_factory.mktemp("sharded")
    return kill_and_resume(request, tiny_model_dir, out, "--processes=2", sharding="full")


@pytest.mark.parametrize("name", NAMES)
def test_the_other_process_ends_within_a_minute_and_all_finish_later(runs, name):
    ends = json.loads((runs[0] / "ends.json").read_text())
    (codes, seconds), (again, _) = ends[name]
    if name.startswith("term-"):
        assert codes == [0, 128 + signal.SIGTERM]
    else:
        assert codes[1] == -signal.SIGKILL and codes[0] not in (0, -signal.SIGKILL)
    assert seconds < 50 and again == [0, 0]


def test_the_weights_were_split(runs):
    names = tensors(runs[0] / "whole", STEPS, "trainer")
    assert {name.partition(" ")[0] for name in names} == {
        f"{kind}{rank}.safetensors" for kind in ("optimizer", "reference") for rank in ("", "-rank1")
    }
