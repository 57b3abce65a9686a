"""Sends weights from the trainer's device to the servers': by NCCL between GPUs, by gloo between CPUs.

Each server's workers share a group with the trainer, so that a dead one holds up no other. The group moves
bytes; their names and shapes go by HTTP under the server's lock. vLLM's own transfer engines are not used:
they need vLLM in the trainer, answer 200 although a layer is missing, and a fault ends the server.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rollout.engine import EngineError
from rollout.fingerprint import HeldTensor
from rollout.vllm.bucket import Layout, fillings, size_of_bucket
from rollout.vllm.control import ServerDead
from rollout.vllm.core import in_thread
from rollout.vllm.member import TICK_S, Member
from rollout.vllm.weight_files import NOTHING_YET, Push, known

SCHEME = "nccl://"
BROADCAST_BYTES = 1 << 29  # twice; every filling costs a request of a few milliseconds
POLL_S = 0.0005
_ERRORS = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
_ONE_BY_ONE = Lock()


class Group:
    """The trainer (rank 0) and a server's workers (ranks from 1 on), apart from torch's own groups.

    The constructor and the first `move` return when the other end has come, too.

    Raises:
        RuntimeError: it has not within `timeout_s`.
    """

    def __init__(
        self, store: dist.Store, key: str, *, rank: int, size: int, device: torch.device, timeout_s: float
    ) -> None:
        self._wait_s, self._is_open = timeout_s, True
        pair, limit = dist.PrefixStore(key, store), timedelta(seconds=timeout_s)
        if device.type == "cpu":
            self._group: Any = dist.ProcessGroupGloo(pair, rank, size, limit)
            return
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        with _without_watchdog():
            self._group = dist.ProcessGroupNCCL(pair, rank, size, options)

    def move(self, bytes_B: Tensor) -> None:
        """Sends these bytes, or fills them with those that were sent.

        Raises:
            RuntimeError: the other end has gone, or does not take part; the group is then of no more use.
        """
        work, deadline = self._group.broadcast([bytes_B]), time.monotonic() + self._wait_s
        while not work.is_completed():
            if not self._is_open or time.monotonic() > deadline:
                self.close()
                raise RuntimeError(f"no broadcast of {len(bytes_B)} bytes within {self._wait_s:g} s")
            time.sleep(POLL_S)
        work.wait()

    def close(self) -> None:
        """Ends what is under way; safe to call twice."""
        if self._is_open:
            self._is_open = False
            self._group.abort()


@contextmanager
def _without_watchdog() -> Iterator[None]:
    """NCCL groups that are made within end no process: by default torch kills one whose peer has died."""
    with _ONE_BY_ONE:  # servers join at the same time, in threads
        before = os.environ.get(_ERRORS)
        os.environ[_ERRORS] = "0"
        try:
            yield
        finally:
            del os.environ[_ERRORS]
            if before is not None:
                os.environ[_ERRORS] = before


def joined(url: str, key: str, *, rank: int, size: int, bytes_B: Tensor, timeout_s: float) -> Group:
    """One end of the group `key` whose trainer listens at `url`, after a first broadcast of a few bytes."""
    host, _, port = url.removeprefix(SCHEME).rpartition(":")
    limit = timedelta(seconds=timeout_s)
    store = dist.TCPStore(host, int(port), None, False, limit, wait_for_workers=False)
    group = Group(store, key, rank=rank, size=size, device=bytes_B.device, timeout_s=timeout_s)
    group.move(bytes_B[:8])
    return group


@dataclass(slots=True, eq=False)
class Link:
    """A server that has joined a group. `has`: the content that it was sent whole, and has yet to prove."""

    member: Member
    group: Group
    has: str = ""


class WeightBroadcast:
    """Sends each version to all servers at once, and keeps it for those that join later.

    What is kept costs one copy of the weights in the engines' dtypes, on the CPU.

    Args:
        held: what the servers hold (`Control.describe`); it decides the device.
        url: nccl, this host's address for the servers, and a port. Nothing is encrypted.
        timeout_s: longest wait for a server.

    Raises:
        ValueError: this host cannot listen at `url`.
    """

    def __init__(self, held: Mapping[str, HeldTensor], *, url: str, timeout_s: float) -> None:
        self._url, self._timeout_s = url, timeout_s
        self._links: dict[str, Link] = {}
        self._held = {name: one for name, one in held.items() if one.source == name}
        self._writer = secrets.token_hex(4)
        self._push: Push | None = None
        self._kept: list[tuple[Layout, int]] = []  # how the copies are filled
        self._copies: list[Tensor] = []
        self.num_bytes = sum(one.num_bytes for one in self._held.values())
        self._device = next(iter(self._held.values())).device
        size = size_of_bucket(self._held, BROADCAST_BYTES)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=self._device) for _ in range(2)]
        self._side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._first_B = torch.zeros(8, dtype=torch.uint8, device=self._device)
        self._store: dist.TCPStore | None = _listening(url, timeout_s)

    def write(self, weights: Iterable[tuple[str, Tensor]], *, version: int) -> Push:
        """Sends the weights to all servers that are up and have joined; `bring` sees to the others.

        Raises:
            ValueError: the stream lacks a weight, or has one that the servers lack.
        """
        content = f"{version}.{self._writer}"
        self._push = Push(version, content, self._url, "", "", self.num_bytes, 1.0)
        self._wait_for_copies()
        self._kept = []
        for link in list(self._links.values()):
            if not link.member.is_up:
                self._drop(link)
        for link in list(self._links.values()):
            self._try(link, partial(self._announce, link, content))
        sent: list[tuple[Link, list[Future[Any]]]] = []

        def arrive() -> None:
            for link, ends in sent:
                self._try(link, partial(self._wait, link.member, ends, f"version {version}"))
            sent.clear()

        try:
            for layout, bytes_B in fillings(known(weights, self._held), self._held, self._buffers):
                arrive()  # the filling before, whose buffer is the next to be filled
                sent += [(link, self._begin(link, layout, bytes_B)) for link in self._links.values()]
                self._keep(layout, bytes_B)
        finally:
            arrive()
        for link in self._links.values():
            link.has = content
        return self._push

    def bring(self, member: Member, push: Push) -> None:
        """Sends the kept weights to a server that lacks them; it joins a group first.

        Raises:
            EngineError, ValueError: it did not join or did not take them; its weights are unknown.
        """
        link = self._links.get(member.server.url)
        if link is not None and link.has == push.content:
            link.has = ""
            return
        if (link := self._links.pop(member.server.url, None)) is not None:
            link.group.close()
        link = self._joined(member)
        self._wait_for_copies()
        try:
            self._announce(link, push.content)
            for (layout, end), copy in zip(self._kept, self._copies, strict=False):
                self._wait(member, self._begin(link, layout, copy[:end].to(self._device)), "kept weights")
        except BaseException:
            link.group.close()
            raise
        self._links[member.server.url] = link

    def whole(self) -> Push:
        """The version that was sent last.

        Raises:
            ValueError: there is none yet.
        """
        if self._push is None:
            raise ValueError(NOTHING_YET)
        return self._push

    def commit(self) -> None:
        """Does nothing: every version is sent whole."""

    def close(self) -> None:
        for link in self._links.values():
            link.group.close()
        self._links, self._store = {}, None  # no longer listens

    def _joined(self, member: Member) -> Link:
        key = secrets.token_hex(8)
        asked = (self._url, key, len(self._buffers[0]), self._timeout_s)
        size = 1 + member.control.facts().num_workers
        own = {"rank": 0, "size": size, "bytes_B": self._first_B, "timeout_s": self._timeout_s}
        ends = (
            in_thread(partial(member.control.tell, "cohort_join", *asked, deed="join the trainer's group")),
            in_thread(partial(joined, self._url, key, **own)),
        )
        self._wait(member, ends, "joining the trainer's group")
        return Link(member, ends[1].result())

    def _announce(self, link: Link, content: str) -> None:
        """The server checks what it is about to get; from here it holds no weights that could be used."""
        plan = {n: [list(h.shape), str(h.dtype).removeprefix("torch.")] for n, h in self._held.items()}
        link.has = ""
        deed = f"get ready for {content}"
        told = in_thread(partial(link.member.control.tell, "cohort_await", content, plan, deed=deed))
        self._wait(link.member, [told], deed)

    def _begin(self, link: Link, layout: Layout, bytes_B: Tensor) -> list[Future[Any]]:
        """Starts both ends of a broadcast."""
        asked = (layout, len(bytes_B))
        deed = f"take {len(layout)} tensors"
        return [
            in_thread(partial(link.member.control.tell, "cohort_take", *asked, deed=deed)),
            in_thread(partial(link.group.move, bytes_B)),
        ]

    def _wait(self, member: Member, ends: Sequence[Future[Any]], what: str) -> None:
        """Waits until all ends are done.

        Raises:
            ServerDead: the server is dead, or has not answered in time.
            EngineError, ValueError: the first fault of an end.
        """
        deadline, url = time.monotonic() + self._timeout_s, member.server.url
        while True:
            done, left = wait_for(ends, TICK_S, FIRST_EXCEPTION)
            for fault in filter(None, (future.exception() for future in done)):
                is_said = isinstance(fault, EngineError | ValueError)
                raise fault if is_said else EngineError(f"server {url}: {what}: {fault}")
            if not left:
                return
            if (fault := member.loss) is not None:
                raise ServerDead(f"server {url}: {what}: {fault}")
            if time.monotonic() > deadline:
                raise ServerDead(f"server {url}: {what}: no answer within timeout_s={self._timeout_s:g}")

    def _try(self, link: Link, work: Callable[[], None]) -> None:
        """Drops a server's group if a step fails; `bring` tries once more from the start, and says why."""
        try:
            work()
        except (EngineError, ValueError):
            self._drop(link)

    def _drop(self, link: Link) -> None:
        link.group.close()
        self._links = {url: one for url, one in self._links.items() if one is not link}

    def _keep(self, layout: Layout, bytes_B: Tensor) -> None:
        """Copies a filling while it is on its way, into memory that is used again at the next version. On a
        GPU that goes on beside everything else, until the buffer is filled again.
        """
        number, size = len(self._kept), len(bytes_B)
        self._kept.append((layout, size))
        if number == len(self._copies):
            self._copies.append(
                torch.empty(len(self._buffers[0]), dtype=torch.uint8, pin_memory=bytes_B.is_cuda)
            )
        if self._side is not None:
            before = self._side.record_event()  # the end of the filling before, whose buffer comes next
            torch.cuda.current_stream(self._device).wait_event(before)
        with torch.cuda.stream(self._side):
            self._copies[number][:size].copy_(bytes_B, non_blocking=True)

    def _wait_for_copies(self) -> None:
        if self._side is not None:
            self._side.synchronize()


def _listening(url: str, timeout_s: float) -> dist.TCPStore:
    host, _, port = url.removeprefix(SCHEME).rpartition(":")
    try:
        listener = socket.create_server((host, int(port)))
    except (OSError, OverflowError) as error:
        raise ValueError(f"engine.weights_url={url}: this host cannot listen there: {error}") from error
    options: Any = {"wait_for_workers": False, "master_listen_fd": listener.detach()}
    return dist.TCPStore(host, int(port), None, True, timedelta(seconds=timeout_s), **options)
