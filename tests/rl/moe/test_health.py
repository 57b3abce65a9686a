"""Metrics of routing by hand, their alerts, and the file that a run that goes on compares with."""

from __future__ import annotations

import json
import math

import pytest
import torch

from rl.moe.balance import Load
from rl.moe.health import FILE, Health, load_metrics, overlap, routes_of
from rl.moe.routers import find_routers
from rl.report.verdict import Watch
from tests.rl.moe.tiny import mixtral


def load(counts: list[list[float]]) -> Load:
    counts_LE = torch.tensor(counts, dtype=torch.float64)
    return Load(torch.cat([counts_LE, counts_LE, torch.ones(len(counts_LE), 2)], -1))


def test_an_even_load_and_one_expert_for_all_have_the_known_values():
    even, collapsed = load_metrics(torch.ones(3, 8)), load_metrics(torch.eye(8)[:2])
    assert even == pytest.approx(
        {"moe/load_entropy": 1, "moe/max_violation": 0, "moe/max_violation_layer": 0, "moe/min_load": 1}
    )
    # (max - balance) / balance = (1 - 1/8) / (1/8) = 7, whichever expert a layer takes
    assert collapsed == pytest.approx(
        {"moe/load_entropy": 0, "moe/max_violation": 7, "moe/max_violation_layer": 7, "moe/min_load": 0},
        abs=1e-9,
    )
    mixed = load_metrics(torch.tensor([[2.0, 1, 1], [4, 0, 0]]))
    entropy = (0.5 * math.log(2) + 0.5 * math.log(4)) / math.log(
        3
    )  # of 1/2, 1/4, 1/4; the other layer's is 0
    assert mixed["moe/load_entropy"] == pytest.approx(entropy / 2)
    assert mixed["moe/max_violation"] == pytest.approx((0.5 + 2) / 2)


def test_overlap_is_jaccards_index_whatever_the_order():
    start = torch.tensor([[[0, 1], [2, 3], [4, 5]]])
    now = torch.tensor([[[1, 0], [2, 7], [6, 7]]])
    assert overlap(now, start) == pytest.approx((1 + 1 / 3 + 0) / 3)


def test_an_expert_is_dead_only_after_a_window_without_it():
    health = Health(None, top_k=2, num_steps=100)
    assert "moe/dead_experts" not in health.step(load([[100.0, 0, 50, 50]]))  # 200 choices of 64 x 4
    assert health.step(load([[50.0, 0, 50, 50]]))["moe/dead_experts"] == 0.25
    assert health.step(load([[1.0, 1, 1, 1]]))["moe/dead_experts"] == 0.25  # until the next window is full


def test_growth_is_measured_from_the_first_step_and_warned_of():
    health, watch, told = Health(None, top_k=1, num_steps=100), Watch(), []
    for step in range(8):  # violations of 1 at the start, then of 2.2: a fine-tuned mixture starts uneven
        values = health.step(load([[2.0, 1, 1, 0]] if step < 2 else [[3.2, 0.8, 0, 0]]))
        told += [str(finding) for finding in watch.broken(step, values)]
    assert values["moe/violation_growth"] == pytest.approx(2.2)
    assert (
        "moe/violation_growth is 2.2, healthy is at most 2" in told[-1] and "moe.balance=switch" in told[-1]
    )
    even = Health(None, top_k=1, num_steps=100)
    even.step(load([[1.0, 1, 1, 1]]))
    assert even.step(load([[1.9, 1, 1, 0.1]]))["moe/violation_growth"] == pytest.approx(1.8)  # 0.9 / 0.5


def test_a_run_that_goes_on_compares_with_its_first_step(tmp_path):
    model = mixtral()
    sites, ids = find_routers(model), torch.arange(10)
    routes = routes_of(model, sites, ids[None])
    assert routes.shape == (2, 10, 2)
    health = Health(tmp_path, top_k=2, num_steps=100)
    assert health.step(load([[3.0, 1, 0, 0]] * 2), routes)["moe/start_overlap"] == 1
    health.write(1)
    health.write(2)
    health.write(3)  # of 100 steps every second one is kept
    health.close()
    rows = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["load"] == [[300, 100, 0, 0]] * 2 and "start" not in rows[1]
    for site in sites:
        site.module.weight.data.neg_()
    moved = routes_of(model, sites, ids[None])
    again = Health(tmp_path, top_k=2, num_steps=100)
    values = again.step(load([[4.0, 0, 0, 0]] * 2), moved)
    assert (
        values["moe/start_overlap"] == pytest.approx(overlap(moved, routes)) and overlap(moved, routes) < 0.5
    )
    assert values["moe/violation_growth"] == pytest.approx(3 / 2)
    again.write(2)
    rows = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and rows[1]["load"] == [[400, 0, 0, 0]] * 2
    again.close()


def test_a_step_without_tokens_says_nothing():
    assert Health(None, top_k=2, num_steps=10).step(load([[0.0, 0, 0, 0]])) == {}
