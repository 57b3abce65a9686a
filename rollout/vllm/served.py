"""Asks one vLLM server for completions: token ids in and out, every completion a stream of its own.

The streams run in a thread with its own connections, apart from those that control the server. A stream that
breaks off keeps the tokens that it brought, and another server can go on from them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import cycle
from queue import SimpleQueue
from typing import Any, TypeVar

import httpx

from rl.types import SamplingParams
from rollout.engine import WEIGHTS_UNKNOWN, EngineError
from rollout.vllm.control import CONNECT_S, LEASE_S
from rollout.vllm.core import NOT_FINITE, UNREAD, Stream, gauges_of, request_body, unread
from rollout.vllm.weight_files import writer_of

GENERATE = "/inference/v1/generate"
POLL_S = 1.0
POLL_TIMEOUT_S = 10.0
RENEW_S = 5.0  # also the time whose tokens are lost with a server
KEEP_ALIVE_S = 2.0  # a server closes an idle connection after 5 s, perhaps just as a request comes
NUM_POOLS = 64  # of connections: httpx looks at all of a pool, for each one, whenever a stream begins or ends
END_S = 5.0  # for the last message of a completion that a server has ended
LOOP_S = 60.0  # longest wait for the thread of the streams
UNPROVED = "it sampled with weights that nobody has proved ({})"
T = TypeVar("T")


class Server:
    """One server's streams and health, all of which belong to the thread of its event loop.

    Args:
        salt: of the prompts that this start of the run caches; prompts that were cached before do not match.
        sink: where (server, stream) goes when one has ended.
        sends: this process sends the weights; else it learns of new ones after they have begun to sample.
        run: for which it renews the lease of a proved server; empty: it needs none.

    Attributes:
        version: of the weights that it was proved to hold; WEIGHTS_UNKNOWN: of none.
        label: what it calls these weights.
        fault: why it does not answer; None while it does.
        failing_since: `time.monotonic()` when its health checks began to fail; None while they succeed.
        answered: `time.monotonic()` when a health check last succeeded.
        is_gone: nobody listens there, or vLLM says that its engine is dead.
        refusal: a request that it calls wrong, which is not a fault of the server.
        doubt: why `version` is not known any longer.
        gauges: its latest metrics, by the values of `core.GAUGES`; None before the first.
    """

    def __init__(
        self,
        url: str,
        token: str | None,
        *,
        salt: str,
        sink: SimpleQueue[tuple[Server, Stream]],
        sends: bool = True,
        run: str = "",
    ) -> None:
        self._holder, self._renewed = run, 0.0
        self.url, self.salt, self.sink, self.sends = url, salt, sink, sends
        self.version, self.label, self._num_proofs = WEIGHTS_UNKNOWN, "", 0
        self.fault: str | None = None
        self.failing_since: float | None = None
        self.is_gone, self.answered, self.doubt = False, 0.0, ""
        self.refusal: str | None = None
        self.gauges: dict[str, float] | None = None
        self.asked = threading.Event()  # its health, for the first time
        self._streams: dict[str, Stream] = {}
        self._labels: dict[str, int] = {}
        self._loop = asyncio.new_event_loop()
        make = partial(
            httpx.AsyncClient,
            base_url=url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEP_ALIVE_S),
            timeout=httpx.Timeout(None, connect=CONNECT_S),
            trust_env=False,  # a proxy would learn the token
            verify=httpx.create_ssl_context(trust_env=False),
        )
        self._http, *self._pools = [make() for _ in range(1 + NUM_POOLS)]
        self._turns = cycle(self._pools)
        self._thread = threading.Thread(target=self._run, name=f"streams of {url}", daemon=True)
        self._thread.start()

    def start(self, streams: Sequence[Stream]) -> None:
        self._loop.call_soon_threadsafe(self._start, streams)

    def cancel(self, ids: Collection[str]) -> None:
        """Ends streams without an answer; the server sees its client hang up, and stops."""
        self._loop.call_soon_threadsafe(self._cancel, ids)

    def give_up(self, *, keep: bool) -> None:
        """Ends all streams, and distrusts the server. With `keep`, streams keep what is sure, unless unproved
        weights were found there: which tokens those sampled is not known before a stream's end.
        """

        def end() -> None:
            is_sure = keep and self.version != WEIGHTS_UNKNOWN
            for stream in self._streams.values():
                stream.drop(stream.sure if is_sure else 0)
            self._cancel(list(self._streams))
            self._labels, self.version = {}, WEIGHTS_UNKNOWN

        self._in_loop(end, "the end of its streams")

    def distrust(self, doubt: str) -> None:
        self.doubt, self.version = doubt, WEIGHTS_UNKNOWN

    def settle(self, holds: str, brought: Mapping[Stream, int]) -> None:
        """What streams had brought is sure if the server, asked afterwards, `holds` the weights that it has
        proved. Else it is dropped, and the server is not trusted any longer.
        """
        if holds != self.label:
            self.distrust(UNPROVED.format(holds))
        for stream, number in brought.items():
            if holds == self.label:
                stream.sure = number
            else:
                stream.drop()

    def mark(self, counts: Mapping[str, int]) -> None:
        """Notes how much of each stream it has sampled, by request, while it is paused. A stream that it does
        not count any longer has ended; this waits for its last message.

        Raises:
            EngineError: a stream does not end, or has brought more than it counts.
        """

        def note() -> list[Stream]:
            for stream in self._streams.values():
                stream.mark(counts.get(stream.asked_as), self.version)
            begun = [stream for stream in self._streams.values() if len(stream.token_ids) > stream.first]
            return [stream for stream in begun if stream.asked_as not in counts]

        ended, deadline = self._in_loop(note, "a pause's counts"), time.monotonic() + END_S
        while any(self._streams.get(stream.id) is stream for stream in ended):
            if time.monotonic() > deadline:
                raise EngineError(f"it counts no tokens of a completion that did not end within {END_S:g} s")
            time.sleep(END_S / 1000)

    def stand_still(self) -> None:
        """Ends streams without a token until `holds`: others may replace the weights that would sample it."""
        self._in_loop(lambda: [stream.task.cancel() for stream in self._empty()], "a pause")

    def holds(self, version: int, label: str, paused: Iterable[tuple[Stream, int | None]] = ()) -> None:
        """Notes that its tokens are now of `version`, which it calls `label`. Streams without a token begin
        again, so that they do not find prompts that older weights have cached.

        Args:
            paused: streams, and what it had sampled of each (`mark`), if another process has updated it.

        Raises:
            EngineError: this process does not send weights, and these come from another sender than before.
        """
        if not self.sends and writer_of(self.label) not in ("", writer_of(label)):
            raise EngineError(f"it holds weights of another run ({label})")

        def begin_again() -> None:
            for stream, count in paused:
                stream.mark(count, self.version, version)
            self._labels[label] = self.version = version
            self.label, self._num_proofs = label, self._num_proofs + 1
            empty = self._empty()
            self._cancel([stream.id for stream in empty])
            self._start(empty)

        self._in_loop(begin_again, f"version {version}")

    def score(self, token_ids: list[int]) -> Future[list[float]]:
        """log p(ids[i] | ids[:i]) for i >= 1 at temperature 1; streams do not bring these."""
        return self._soon(self._score(token_ids))

    def close(self) -> None:
        """Ends its streams and its thread; safe to call twice."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CONNECT_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.create_task(self._watch())
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        closing = [pool.aclose() for pool in (self._http, *self._pools)]
        self._loop.run_until_complete(asyncio.gather(*closing, return_exceptions=True))
        self._loop.close()

    def _soon(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _in_loop(self, work: Callable[[], T], what: str) -> T:
        async def run() -> T:
            return work()

        try:
            return self._soon(run()).result(LOOP_S)
        except TimeoutError as error:
            took = f"did not take {what} within {LOOP_S:g} s"
            raise EngineError(f"server {self.url}: the thread of its streams {took}") from error

    def _start(self, streams: Sequence[Stream]) -> None:
        for stream in streams:
            self._streams[stream.id] = stream
            stream.task = self._loop.create_task(self._sample(stream))

    def _cancel(self, ids: Collection[str]) -> None:
        for name in ids:
            stream = self._streams.pop(name, None)
            if stream is not None and stream.task is not None:
                stream.task.cancel()

    def _empty(self) -> list[Stream]:
        return [stream for stream in self._streams.values() if len(stream.token_ids) == stream.first]

    def _salt(self) -> str:
        """A digest of the run, its start, the version and its proof. Other weights never find these cached
        prompts, not even weights that others have pushed between two proofs of one version.
        """
        said = f"{self.salt}/{self.version}/{self._num_proofs}"
        return hashlib.blake2b(said.encode(), digest_size=16).hexdigest()

    async def _sample(self, stream: Stream) -> None:
        """Samples what is left of a completion; then it goes to the sink."""
        body = stream.begin(self._salt())
        try:
            async with next(self._turns).stream("POST", GENERATE, json=body) as reply:
                if not reply.is_success:
                    await reply.aread()
                    self._raise_for(reply)
                async for line in reply.aiter_lines():
                    if self.version == WEIGHTS_UNKNOWN:  # it would stand where `settle` drops tokens
                        stream.drop()
                        break
                    if line.startswith("data: {"):
                        stream.take(json.loads(line.removeprefix("data: ")), self.version)
                else:
                    if stream.reason is None:  # nobody is asked what sampled its tokens
                        raise RuntimeError("it ended a completion without a reason")
        except Exception as error:  # nobody else would know that the stream has ended
            stream.drop(stream.sure if self.version != WEIGHTS_UNKNOWN else 0)
            self.fault = f"{type(error).__name__}: {error}"
        self._check_versions(stream)
        del self._streams[stream.id]
        self.sink.put((self, stream))

    def _raise_for(self, reply: httpx.Response) -> None:
        said = f"POST {reply.url.path} was answered with {reply.status_code}: {reply.text[:300]}"
        if reply.is_client_error:
            self.refusal = said
        raise EngineError(said)

    def _check_versions(self, stream: Stream) -> None:
        """Takes the tokens' versions from the server's labels, if it gives them. Tokens of unproved weights
        are dropped, and the server is distrusted.
        """
        if stream.said is None:
            return
        known = [self._version_of(label) for label in stream.said]
        if None in known:
            first = known.index(None)
            self.distrust(UNPROVED.format(stream.said[first]))
            stream.reason = None
            stream.keep(stream.first + first)
        stream.versions[stream.first :] = known[: len(stream.token_ids) - stream.first]  # type: ignore[assignment]

    def _version_of(self, label: str) -> int | None:
        """A label's version, None if unproved. A process that does not send trusts its sender's labels."""
        is_next = not self.sends and writer_of(label) == writer_of(self.label)
        return int(label.partition(".")[0]) if is_next else self._labels.get(label)

    async def _score(self, token_ids: list[int]) -> list[float]:
        wanted = request_body(SamplingParams(1, temperature=0.0), max_tokens=1, prompt_logprobs=0)
        body = {"token_ids": token_ids, "sampling_params": wanted, "cache_salt": self._salt()}
        try:
            reply = await self._http.post(GENERATE, json=body)
        except httpx.HTTPError as error:
            raise EngineError(f"POST {GENERATE}: {type(error).__name__} {error}") from error
        if not reply.is_success:
            self._raise_for(reply)
        try:
            pairs = zip(reply.json()["prompt_logprobs"][1:], token_ids[1:], strict=True)
            found = [float(at[str(token)]["logprob"]) for at, token in pairs]
            if not all(NOT_FINITE < logprob < math.inf for logprob in found):
                raise ValueError("a log-prob that is not finite")
        except UNREAD as error:
            raise EngineError(f"server {self.url}: {unread(GENERATE, error, reply.text)}") from error
        return found

    async def _watch(self) -> None:
        """Asks for health and metrics, every `POLL_S`."""
        while True:
            before = self.fault
            try:
                reply = await self._http.get("/health", timeout=POLL_TIMEOUT_S)
                reply.raise_for_status()
                reply = await self._http.get("/metrics", timeout=POLL_TIMEOUT_S)
                self.gauges = gauges_of(reply.text) if reply.is_success else {}
                self.fault = None if self.fault == before else self.fault  # a stream's, of this moment
                self.failing_since, self.is_gone = None, False
                self.answered = time.monotonic()
                await self._renew()
            except Exception as error:  # without these checks nobody would ever know that it has died
                self.fault = f"its health check: {type(error).__name__} {error}".strip()
                self.failing_since = self.failing_since or time.monotonic()
                self.is_gone = isinstance(error, httpx.ConnectError | httpx.HTTPStatusError)
            self.asked.set()
            await asyncio.sleep(POLL_S)

    async def _renew(self) -> None:
        """Renews a proved server's lease, and settles its tokens; others may lack our extension."""
        if not self._holder or self.version == WEIGHTS_UNKNOWN or time.monotonic() < self._renewed + RENEW_S:
            return
        proof, before = self._num_proofs, {one: len(one.token_ids) for one in self._streams.values()}
        body = {"method": "cohort_lease", "args": [self._holder, LEASE_S]}
        with suppress(httpx.TimeoutException, ValueError, KeyError):  # it loads weights, perhaps
            reply = await self._http.post("/collective_rpc", json=body, timeout=POLL_TIMEOUT_S)
            told, self._renewed = reply.json()["results"][0], time.monotonic()
            if self.version == WEIGHTS_UNKNOWN or proof != self._num_proofs:
                return
            # Others are elsewhere by now, or handed out.
            before = {one: number for one, number in before.items() if self._streams.get(one.id) is one}
            if told["holder"] != self._holder:
                self.distrust(f"it serves {told['holder']} now")
            elif told["holds"] == self.label or writer_of(told["holds"]) not in ("", writer_of(self.label)):
                self.settle(told["holds"], before)  # else a load is under way
