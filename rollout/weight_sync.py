"""Sends versioned weights to the engine, and proves that they arrived (law 4 of the README)."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rl.types import ALONE, Team, WeightStream
from rollout.engine import Engine
from rollout.fingerprint import compared_part, fingerprints, listed, mismatches

MAX_NAMED = 8
Canary = tuple[list[int], list[float]]
WORST_TOKEN = 8  # a canary token may be off by this many times the allowed mean


class WeightSyncError(RuntimeError):
    """The engine does not hold the policy's weights, or must not get them. The run has to stop."""


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One weight sync. `canary_*` are absolute differences in nats, NaN if it was not verified.

    Attributes:
        parts: seconds to "inspect" what is sent, to "send" it (until the engine has loaded it), to compare
            "fingerprints" while the policy computes its canary, and to compare the "canary".
        verdict: for a sync whose canary waits: computes and compares it, on all processes, and returns the
            whole report. Until then the policy must not change, and nothing may be trained.
    """

    canary_max_gap: float
    canary_mean_gap: float
    parts: Mapping[str, float]
    verdict: Callable[[], SyncReport] | None = None

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def metrics(self) -> dict[str, float]:
        seconds = {f"sync/seconds_{part}": seconds for part, seconds in self.parts.items()}
        return {"sync/seconds": self.seconds} | seconds

    @property
    def canary_metrics(self) -> dict[str, float]:
        return {
            "sync/canary_gap_mean": self.canary_mean_gap,
            "sync/canary_gap_max": self.canary_max_gap,
            "sync/seconds_canary": self.parts.get("canary", 0.0),
        }


def publish(
    engine: Engine,
    weights: WeightStream,
    *,
    version: int,
    team: Team = ALONE,
    sends: bool = True,
    tolerance: float | None = None,
    verify: bool = True,
    canary_waits: bool = False,
) -> SyncReport:
    """Gives the engine the policy's weights of `version` and proves that it computes with them.

    Before sending, every tensor is checked to be finite, expected and of the engine's shape, and
    fingerprinted as the engine will store it. A fault here leaves the engine as it was. After sending,
    the version, the fingerprint of every tensor held, and log-probs of fixed tokens are compared.

    The processes of `team` stay in step, since a stream may be collective: each iterates every pass to its
    end, whatever breaks off meanwhile. A fault is kept, gathered after the pass, and raised on all.

    Args:
        weights: iterated twice, so that a stream that changes between two passes is caught as well.
        sends: False: this process iterates along, and its engine adopts the version that others have sent.
        tolerance: largest mean gap of the canary's log-probs, nats; None: 0.0025 if the engine is all
            float32, else 0.2 (right weights in bf16: 0.03 to 0.1). One token may be off `WORST_TOKEN` times.
        verify: False only checks that everything is finite. It must be the same on all processes.
        canary_waits: the engine may sample before its canary is compared, by `SyncReport.verdict`.

    Raises:
        WeightSyncError: it names the tensors, the version or the gap, and the process if there are several.
    """
    parts: dict[str, float] = {}
    canary: Canary | None = None
    with _part("inspect", parts, team):
        sent = _inspect(engine, weights, version, verify) if sends else _iterated(weights)
        if not sends:
            engine.hold()  # before others replace the weights that it samples with
    with _part("send", parts, team):
        load = partial(engine.update_weights, version=version)
        work: Any = (load, f"version {version} was not loaded: engine {engine.name}") if sends else ()
        _iterated(weights, *work)
    if verify:
        with _part("fingerprints", parts, team):
            held, canary = _at_once(engine, weights, version, sends=sends, canary_waits=canary_waits)
            if sends:
                _compare(engine, sent, held, version)

    def verdict() -> SyncReport:
        with _part("canary", parts, team):
            gaps = _canary_gaps(engine, canary or weights.canary(), version=version, tolerance=tolerance)
        return SyncReport(max(gaps), sum(gaps) / len(gaps), dict(parts))

    if not (sends or verify):
        engine.adopt(version)
    if verify and not canary_waits:
        return verdict()
    return SyncReport(math.nan, math.nan, dict(parts), verdict if verify else None)


@contextmanager
def _part(name: str, parts: dict[str, float], team: Team) -> Iterator[None]:
    """Notes the seconds of a block and keeps its fault; then raises the faults of all processes on each."""
    began = time.perf_counter()
    fault: Exception | None = None
    try:
        yield
    except Exception as error:
        fault = error
    said = str(fault) if isinstance(fault, WeightSyncError) else f"{type(fault).__name__}: {fault}"
    told = team.gather(said if fault is not None else None)
    parts[name] = time.perf_counter() - began
    if len(told) > 1:
        told = [one and f"process {rank} of {len(told)}: {one}" for rank, one in enumerate(told)]
    if faults := [one for one in told if one is not None]:
        raise WeightSyncError("; ".join(faults[:MAX_NAMED])) from fault


def _iterated(
    weights: WeightStream,
    work: Callable[[Iterator[tuple[str, Tensor]]], Any] = lambda stream: {},
    what: str = "the policy's stream",
) -> Any:
    """Returns what `work` makes of a pass, which is iterated to its end even if `work` breaks off."""
    stream, place = iter(weights), "before the first tensor"

    def noted() -> Iterator[tuple[str, Tensor]]:
        nonlocal place
        for name, tensor in stream:
            place = f"at {name}"
            yield name, tensor

    try:
        result = work(noted())
        deque(stream, maxlen=0)
    except Exception as fault:
        with suppress(Exception):  # of two faults the first one tells more
            deque(stream, maxlen=0)
        raise WeightSyncError(f"{what} broke off {place}: {type(fault).__name__}: {fault}") from fault
    return result


def _inspect(engine: Engine, weights: WeightStream, version: int, verify: bool) -> dict[str, int]:
    """Fingerprints of what is about to be sent, by the engine's names."""
    extremes: dict[str, tuple[Tensor, Tensor]] = {}
    copies: dict[str, list[str]] = {}
    for name, held in engine.tensors.items():
        copies.setdefault(held.source, []).append(name)
    unexpected: list[str] = []

    def parts(stream: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stream:
            if (fault := _shape_fault(engine, name, tensor)) is not None:
                unexpected.append(fault)
                continue
            extremes[name] = torch.aminmax(tensor.detach())
            for copy in copies[name] if verify else ():
                yield copy, compared_part(tensor, engine.tensors[copy], version)

    what = f"version {version} is not sent: the policy's stream"
    sent = _iterated(weights, lambda stream: fingerprints(parts(stream)), what)
    if unexpected:
        raise WeightSyncError(unexpected[0])
    ends = [end for pair in extremes.values() for end in pair]  # of several dtypes: the widest is taken
    finite = torch.stack(ends).isfinite().view(-1, 2).all(-1).tolist() if ends else []
    broken = [name for name, is_finite in zip(extremes, finite, strict=True) if not is_finite]
    if broken:
        raise WeightSyncError(
            f"version {version} is not sent: {listed(broken)} not finite; the engine keeps {engine.version}"
        )
    if missing := sorted(copies.keys() - extremes.keys()):
        raise WeightSyncError(f"version {version} is not sent: the policy's stream lacks {listed(missing)}")
    return sent


def _shape_fault(engine: Engine, name: str, tensor: Tensor) -> str | None:
    held = engine.tensors.get(name)
    if held is not None and held.shape == tuple(tensor.shape):
        return None
    has = f"{name} {held.shape}" if held else f"{listed(sorted(engine.tensors), 3)}, not this name"
    return (
        f"the policy sends {name} {tuple(tensor.shape)} and engine {engine.name} has {has}; start both "
        "from the same model (for a model family whose vLLM names differ, use engine.name=transformers)"
    )


def _at_once(
    engine: Engine, weights: WeightStream, version: int, *, sends: bool, canary_waits: bool
) -> tuple[Mapping[str, int], Canary | None]:
    """Fingerprints of what the engine holds, and the policy's canary if it is due. If the engine has a
    process of its own, both are computed at once. No fault of the engine keeps this process from the canary,
    which may be collective. Without `sends` the engine adopts the version, and only its canary is compared.
    """
    if sends and engine.runs_alone and not canary_waits:
        with ThreadPoolExecutor(1, "fingerprints") as thread:  # the end of the block waits for the engine
            held = thread.submit(engine.fingerprints)
            canary = weights.canary()
            return held.result(), canary
    canary = None if canary_waits else weights.canary()
    if sends:
        return engine.fingerprints(), canary
    engine.adopt(version)
    return {}, canary


def _compare(engine: Engine, sent: dict[str, int], held: Mapping[str, int], version: int) -> None:
    if engine.version != version:
        raise WeightSyncError(
            f"engine {engine.name} says it holds version {engine.version} after version {version} was sent"
        )
    if wrong := mismatches(sent, held):
        raise WeightSyncError(
            f"engine {engine.name} does not hold version {version}: the fingerprints of {len(wrong)} of "
            f"{len(sent)} tensors differ from the policy's: {listed(wrong)}"
        )


def _canary_gaps(engine: Engine, canary: Canary, *, version: int, tolerance: float | None) -> Sequence[float]:
    """Absolute gaps between the engine's log-probs of fixed tokens and the policy's, in nats."""
    ids, expected = canary
    if tolerance is None:
        tolerance = 0.0025 if all(h.dtype == torch.float32 for h in engine.tensors.values()) else 0.2
    gaps = [abs(a - b) for a, b in zip(engine.prompt_logprobs(ids), expected, strict=True)]
    mean, worst = sum(gaps) / len(gaps), max(gaps)
    if not (mean <= tolerance and worst <= WORST_TOKEN * tolerance):
        raise WeightSyncError(
            f"engine {engine.name} holds version {version} but computes differently: the canary's log-probs "
            f"are {mean:.3g} nats from the policy's on average and {worst:.3g} at most, more than "
            f"{tolerance:g} and {WORST_TOKEN * tolerance:g} (engine.canary_tolerance)"
        )
    return gaps
