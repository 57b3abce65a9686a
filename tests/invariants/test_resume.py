"""Law 6 with one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.invariants.resume_laws import (  # noqa: F401
    kill_and_resume,
    test_every_prompt_is_consumed_once_and_in_the_same_order,
    test_it_was_killed_left_no_process_and_then_finished,
    test_metrics_have_neither_gaps_nor_doubles,
    test_two_checkpoints_are_kept_and_load_as_plain_models,
    test_weights_and_optimizer_are_bitwise_those_of_an_undisturbed_run,
)

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def runs(request, tiny_model_dir, tmp_path_factory) -> tuple[Path, dict[str, list[int]]]:
    return kill_and_resume(request, tiny_model_dir, tmp_path_factory.mktemp("runs"))
