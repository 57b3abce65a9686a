"""Gradients summed while the last backward pass runs are those summed after it, on two gloo processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.diffusion.processes import launch

SCRIPT = Path(__file__).with_name("summing_processes.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sums")
    launch(SCRIPT, [str(folder)], 2)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", ["even", "uneven", "idle", "again"])
def test_they_are_equal_however_much_work_each_process_has(found, case):
    for of_rank in found:
        assert of_rank[case]["gap"] <= 1e-6 and of_rank[case]["alone"] <= 1e-6
        assert of_rank[case]["norm"] == found[0][case]["norm"] > 0.1


def test_most_buckets_go_while_the_pass_runs_and_none_in_deterministic_mode(found):
    """A last pass of odd number leaves a layer out: its weights are the last bucket, its biases in the one
    before it. A third pass leaves out none, and a process without a pass sends all at the end.
    """
    cases, n = ("even", "uneven", "idle", "again"), found[0]["buckets"]
    assert n >= 5 and all(of_rank[case]["sent"][0] == 0 for of_rank in found for case in cases)
    sent = {case: [of_rank[case]["sent"][1] for of_rank in found] for case in cases}
    assert sent == {"even": [n - 2, n - 2], "uneven": [n, n - 2], "idle": [n - 2, 0], "again": [n - 2, n - 2]}


def test_both_send_the_same_buckets_in_the_same_order(found):
    assert found[0]["order"] == found[1]["order"] and len(found[0]["order"]) == 8 * found[0]["buckets"]


def test_a_gradient_that_fills_a_bucket_is_summed_where_it_lies(found):
    assert all(of_rank["in_place"] and all(of_rank["in_place"]) for of_rank in found)
