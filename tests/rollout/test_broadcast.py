"""Broadcasts of weights, as far as they need no server: two ends of a group, and how a bucket is filled."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rollout.fingerprint import HeldTensor
from rollout.vllm.broadcast import _ERRORS, Group, WeightBroadcast, _listening, _without_watchdog, joined
from rollout.vllm.bucket import fillings, view
from tests.vllm_servers import free_port

CPU = torch.device("cpu")
A, B, HEAD = "a.weight", "b.weight", "lm_head.weight"
HELD = {
    A: HeldTensor((2, 8), torch.bfloat16, CPU, A),
    B: HeldTensor((4,), torch.float32, CPU, B),
    HEAD: HeldTensor((2, 8), torch.bfloat16, CPU, A),  # tied: no stream carries it
}


def both_ends(url: str, timeout_s: float) -> list[Group]:
    """The trainer's end and a server's, here in two threads."""
    with ThreadPoolExecutor(2) as pool:
        bits = [torch.zeros(8, dtype=torch.uint8) for _ in range(2)]
        ends = [
            pool.submit(partial(joined, url, "k", rank=k, size=2, bytes_B=bits[k], timeout_s=timeout_s))
            for k in range(2)
        ]
        return [end.result(90) for end in ends]


def test_bytes_arrive():
    url = f"nccl://127.0.0.1:{free_port()}"
    store = _listening(url, 60.0)
    trainer, server = both_ends(url, 60.0)
    sent = torch.randint(256, (3_000_001,), dtype=torch.uint8)
    got = torch.zeros_like(sent)
    with ThreadPoolExecutor(2) as pool:
        for move in [pool.submit(trainer.move, sent), pool.submit(server.move, got)]:
            move.result(60)
    assert torch.equal(sent, got) and int(sent.sum()) > 0
    for end in (trainer, server):
        end.close()
        end.close()
    del store


def test_an_end_that_takes_no_part_is_given_up():
    url = f"nccl://127.0.0.1:{free_port()}"
    store = _listening(url, 20.0)
    trainer, server = both_ends(url, 20.0)
    trainer._wait_s = 1.0  # both ends are there: only the move has to be quick
    with pytest.raises(RuntimeError, match=r"no broadcast of 64000000 bytes within 1 s"):
        trainer.move(torch.zeros(64_000_000, dtype=torch.uint8))
    server.close()
    del store


def test_a_bucket_is_filled_in_the_engines_dtype_and_again_when_the_next_one_has_no_room():
    """A takes 32 bytes and B 16, each from a multiple of 256 on."""
    weights = [(A, torch.arange(16.0).view(2, 8) + 2**-9), (B, torch.tensor([1.5, 2.0, 3.0, -4.0]))]
    bucket = torch.zeros(300, dtype=torch.uint8)
    ((layout, used),) = fillings(weights, HELD, [bucket[:272]])
    assert (layout, len(used)) == ([[A, 0], [B, 256]], 272)  # 256 + 16 fit
    assert view(bucket, 256, HELD[B]).tolist() == [1.5, 2.0, 3.0, -4.0]
    assert view(bucket, 0, HELD[A])[1].tolist() == [8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0]  # rounded
    small = [bucket[:264], torch.zeros(264, dtype=torch.uint8)]
    (first, one), (second, other) = fillings(weights, HELD, small)
    assert (first, second) == ([[A, 0]], [[B, 0]])  # each in a buffer of its own, so that both are there
    assert (view(one, 0, HELD[A])[1, 0].item(), view(other, 0, HELD[B])[0].item()) == (8.0, 1.5)


def test_groups_that_are_made_at_once_all_do_without_the_watchdog(monkeypatch: pytest.MonkeyPatch):
    """Each sets the process's environment for a moment; by torch's default a lost server ends the trainer."""
    monkeypatch.setenv(_ERRORS, "3")
    first_is_in, first_is_out, found = Event(), Event(), []

    def first() -> None:
        with _without_watchdog():
            first_is_in.set()
            first_is_out.wait(0.3)  # the second one asks meanwhile
            found.append(os.environ[_ERRORS])
        first_is_out.set()

    def second() -> None:
        first_is_in.wait(60)
        with _without_watchdog():
            first_is_out.wait(60)
            found.append(os.environ.get(_ERRORS, "unset"))

    with ThreadPoolExecutor(2) as pool:
        for end in [pool.submit(first), pool.submit(second)]:
            end.result(90)
    assert found == ["0", "0"] and os.environ[_ERRORS] == "3"


def test_a_port_that_is_taken_is_refused_by_the_key():
    url = f"nccl://127.0.0.1:{free_port()}"
    first = WeightBroadcast(HELD, url=url, timeout_s=5.0)
    with pytest.raises(
        ValueError, match=f"engine.weights_url={url}: this host cannot listen there: .* in use"
    ):
        WeightBroadcast(HELD, url=url, timeout_s=5.0)
    with pytest.raises(ValueError, match="no weights were written yet"):
        first.whole()
    with pytest.raises(ValueError, match=r"the stream of weights lacks b\.weight"):
        first.write([(A, torch.zeros(2, 8))], version=1)
    first.close()
    again = WeightBroadcast(HELD, url=url, timeout_s=5.0)  # the next run of this process
    again.close()
    assert first is not again


class SlowServer:
    """A server's end of a broadcast, here in threads: slow to take part; it notes what came."""

    def __init__(self, size: int) -> None:
        self.server, self.control, self.loss, self.is_up = SimpleNamespace(url="here"), self, None, True
        self.bytes_B, self.took = torch.zeros(size, dtype=torch.uint8), dict[str, torch.Tensor]()

    def facts(self) -> SimpleNamespace:
        return SimpleNamespace(num_workers=1)

    def tell(self, method: str, *asked: Any, deed: str) -> dict[str, str]:
        if method == "cohort_join":
            url, key, _, timeout_s = asked
            self.group = joined(url, key, rank=1, size=2, bytes_B=self.bytes_B, timeout_s=timeout_s)
        if method == "cohort_take":
            time.sleep(0.3)
            layout, size = asked
            self.group.move(self.bytes_B[:size])
            self.took |= {name: view(self.bytes_B, start, BIG[name]).clone() for name, start in layout}
        return {}


BIG = {name: HeldTensor((1 << 20,), torch.bfloat16, CPU, name) for name in "abcde"}


def test_a_buffer_is_filled_again_only_when_all_of_it_has_arrived(monkeypatch: pytest.MonkeyPatch):
    """Five fillings through two buffers; a server that joins later gets them from the copies."""
    monkeypatch.setattr("rollout.vllm.broadcast.BROADCAST_BYTES", 1)  # so each has the size of a tensor
    weights = [(name, torch.full((1 << 20,), float(k))) for k, name in enumerate(BIG, 1)]
    broadcast = WeightBroadcast(BIG, url=f"nccl://127.0.0.1:{free_port()}", timeout_s=20.0)
    first: Any = SlowServer(1 << 21)
    push = broadcast.write(weights, version=1)
    broadcast.bring(first, push)  # it joins, and gets the copies
    push = broadcast.write([(name, value * 2) for name, value in weights], version=2)
    assert {name: value.unique().tolist() for name, value in first.took.items()} == {
        name: [2.0 * k] for k, name in enumerate("abcde", 1)
    }
    later: Any = SlowServer(1 << 21)
    later.server.url = "there"
    broadcast.bring(later, push)
    assert {name: value.unique().tolist() for name, value in later.took.items()} == {
        name: [2.0 * k] for k, name in enumerate("abcde", 1)
    }
    broadcast.close()
