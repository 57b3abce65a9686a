"""An engine that plays episodes: a completion may call a tool or answer an environment, and go on.

It is an engine around an engine. Each turn is a completion of its own. Its prompt is the tokens of the row
so far: what is sampled from is what is stored. Many episodes are in flight. If the inner engine samples while
nobody calls it, tools answer meanwhile. An engine that samples only while it is called gets all ready turns
together. So batches, and with them rounding, do not depend on how long tools take.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from rl.types import Call, Completion, FinishReason, Group, Prompt
from rollout.calls import aborted, check_weights
from rollout.engine import Engine, EngineError
from rollout.environment import (
    Environment,
    EnvironmentFault,
    Journal,
    ReadCalls,
    Reply,
    Turn,
    checked_reply,
)
from rollout.play import Play, Playing
from rollout.turns import TurnRenderer

UNDER_WAY = "a call was under way when the run was killed, and it may not be made again"
STATELESS = "the run was killed, and the environment has no state to go on from"
POLL_S = 0.02
CLOSE_S = 10.0


class Interrupted(Exception):
    """An episode that began before a kill cannot be opened again."""


@dataclass(frozen=True, slots=True)
class EpisodeRules:
    """
    Attributes:
        max_turns: an episode that is not over then is cut; its rewards count.
        max_turn_length: tokens of one turn; a turn that is cut ends its episode, and no tool is asked.
        parallel: number of environment calls at a time.
        timeout_s: longest wait of `generate` for any turn or answer.
    """

    max_turns: int = 8
    max_turn_length: int | None = None
    parallel: int = 16
    timeout_s: float = 600.0


class EpisodeEngine:
    """Plays episodes in `environment` with completions of `engine`; it owns both, and closes them.

    Args:
        journal: keeps turns and answers of submitted calls; `generate` writes none.
        facts: what every completion carries, such as a hash of the tools' schemas.
        read_calls: finds the calls of tools in a turn; None: the environment looks for them itself.
    """

    def __init__(
        self,
        engine: Engine,
        environment: Environment,
        render: TurnRenderer,
        journal: Journal,
        *,
        rules: EpisodeRules = EpisodeRules(),
        facts: Mapping[str, Any] | None = None,
        read_calls: ReadCalls | None = None,
    ) -> None:
        self.engine, self.environment, self.render, self.journal = engine, environment, render, journal
        self.rules, self.facts, self.read_calls = rules, dict(facts or {}), read_calls
        self.name, self.tensors = engine.name, engine.tensors
        self.runs_alone, self.held_while_training = engine.runs_alone, engine.held_while_training
        self.sleeps_while_training = engine.sleeps_while_training
        self.hold, self.fingerprints, self.prompt_logprobs = (
            engine.hold,
            engine.fingerprints,
            engine.prompt_logprobs,
        )
        self._playing: list[Playing] = []
        self._finished: list[Playing] = []
        self._ready: list[Play] = []
        self._sampling: dict[str, Play] = {}
        self._asking: dict[Future[Reply], Play] = {}
        self._answered: list[tuple[Play, Mapping[str, Any], bool]] = []
        self._num_played, self._counted_at = 0, 0.0
        self._seconds = [0.0, 0.0]  # since an episode ended: all, and without a turn to sample
        self._closing: list[Future[Any]] = []
        self._threads = ThreadPoolExecutor(rules.parallel, thread_name_prefix="environment")

    @property
    def version(self) -> int:
        return self.engine.version

    @property
    def in_flight(self) -> int:
        return sum(len(playing.plays) for playing in [*self._playing, *self._finished])

    def submit(self, call: Call) -> None:
        check_weights(self.engine)
        self._begin(call, is_journaled=True)

    def _begin(self, call: Call, *, is_journaled: bool) -> list[Playing]:
        begun = []
        for prompt, seed in zip(call.prompts, call.seeds, strict=True):
            begun.append(playing := Playing(prompt))
            for index in range(call.num_completions):
                playing.plays.append(Play(prompt, seed, index, call, self._num_played, is_journaled))
                self._num_played += 1
            self._ready += playing.plays
        self._playing += begun
        return begun

    def collect(self, *, timeout_s: float) -> list[Group]:
        """As `Engine.collect`; a group is finished when all its episodes are over.

        Raises:
            ValueError: the chat template refuses what the environment says.
        """
        deadline = time.monotonic() + timeout_s
        while self._playing and not self._finished:
            self._advance(max(0.0, deadline - time.monotonic()))
            if time.monotonic() >= deadline:
                break
        finished, self._finished = self._finished, []
        return [playing.group for playing in finished]

    def generate(self, call: Call) -> list[Group]:
        """As `Engine.generate`. Submitted calls go on meanwhile."""
        check_weights(self.engine)
        asked = self._begin(call, is_journaled=False)
        last, seen = time.monotonic(), -1
        while any(playing in self._playing for playing in asked):
            self._advance(1.0)
            moved = sum(play.turn + len(play.rewards) for p in self._playing for play in p.plays)
            if moved != seen:
                last, seen = time.monotonic(), moved
            elif time.monotonic() - last > self.rules.timeout_s:
                self.abort([playing.prompt for playing in asked])
                raise EngineError(
                    f"no turn and no answer for {self.rules.timeout_s:g} s, while the run waited for "
                    f"episodes of prompt {asked[0].prompt.id}; lower environment.deadline_s, or raise "
                    "engine.timeout_s"
                )
        self._finished = [playing for playing in self._finished if playing not in asked]
        completions = [c for playing in asked for c in playing.group.completions]
        if completions and all(c.finish_reason == "abort" for c in completions):
            fault = next((c.facts["fault"] for c in completions if "fault" in c.facts), "the engine aborts")
            raise EngineError(f"all episodes of {len(asked)} prompts failed; the first reason: {fault}")
        return [playing.group for playing in asked]

    def abort(self, prompts: Collection[Prompt]) -> None:
        ids = {prompt.id for prompt in prompts}
        gone = [playing for playing in [*self._playing, *self._finished] if playing.prompt.id in ids]
        plays = {play for playing in gone for play in playing.plays}
        for play in plays:
            play.is_dropped = True
        self.engine.abort([play.asked for play in self._sampling.values() if play in plays])
        self._sampling = {name: play for name, play in self._sampling.items() if play not in plays}
        self._ready = [play for play in self._ready if play not in plays]
        self._answered = [known for known in self._answered if known[0] not in plays]
        self._playing = [playing for playing in self._playing if playing not in gone]
        self._finished = [playing for playing in self._finished if playing not in gone]
        for future in [future for future, play in self._asking.items() if play in plays]:
            future.cancel()  # a running one is waited for, and its answer dropped
        for play in plays - set(self._asking.values()):
            self._close(play)

    def update_weights(self, weights: Iterable[tuple[str, Any]], *, version: int) -> None:
        self.engine.update_weights(weights, version=version)
        self.journal.begin(version)

    def adopt(self, version: int) -> None:
        self.engine.adopt(version)
        self.journal.begin(version)

    def close(self) -> None:
        with suppress(EngineError):
            self.abort([playing.prompt for playing in [*self._playing, *self._finished]])
        self.environment.close()  # threads that wait for it fail now
        late: list[Future[Any]] = [*self._asking, *self._closing]
        wait(late, CLOSE_S)
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.engine.close()

    def _advance(self, timeout_s: float) -> None:
        """Starts what is ready, and takes what is sampled or answered within `timeout_s`."""
        self._counted_at = time.monotonic()
        if self._ready and (self.engine.runs_alone or not self._asking):
            self._sample()
        if self._sampling:
            is_waited_for = bool(self._asking or self._answered)
            sampled = self.engine.collect(timeout_s=min(timeout_s, POLL_S) if is_waited_for else timeout_s)
            pairs = [(self._sampling.pop(group.prompt.id), group.completions[0]) for group in sampled]
            self._ask([pair for pair in pairs if self._is_whole(*pair)])
        elif self._asking and not self._answered:
            wait(self._asking, timeout_s, FIRST_COMPLETED)
            self._seconds[1] += self._count()
        self._take_answers()
        self._count()

    def _count(self) -> float:
        """Adds the seconds since it was called last, or `_advance` began, to all of them; returns them."""
        before, self._counted_at = self._counted_at, time.monotonic()
        self._seconds[0] += self._counted_at - before
        return self._counted_at - before

    def _sample(self) -> None:
        """Submits the ready turns in the order of their episodes, in one call for each sampling setting."""
        ready = sorted(self._ready, key=lambda play: play.number)
        self._ready = []
        waves: dict[tuple[Any, bool], list[Play]] = {}
        for play in ready:
            most = min(play.room, self.rules.max_turn_length or play.room)
            sampling = replace(play.call.sampling, max_completion_length=most)
            waves.setdefault((sampling, play.call.with_logprobs), []).append(play)
        for (sampling, with_logprobs), plays in waves.items():
            prompts, seeds = tuple(p.asked for p in plays), tuple(p.turn_seed for p in plays)
            self._sampling |= {prompt.id: play for prompt, play in zip(prompts, plays, strict=True)}
            self.engine.submit(Call(prompts, 1, sampling, seeds, with_logprobs))

    def _is_whole(self, play: Play, completion: Completion) -> bool:
        """Adds a turn; returns whether it ended by itself. A cut one ends its episode without a tool."""
        if completion.finish_reason == "abort" or not completion.token_ids:
            self._fail(play, {})
            return False
        play.add_turn(completion, *self.render.said(completion, play.call.sampling.stop_token_ids))
        if completion.finish_reason == "length":
            self._end(play, "length", "tokens" if play.room <= 0 else "turn_tokens")
        return completion.finish_reason == "stop"

    def _ask(self, pairs: Sequence[tuple[Play, Completion]]) -> None:
        """Asks the environment, unless the journal has the answer. The question is on disk first."""
        asked, entries = [], []
        for play, completion in pairs:
            known = self.journal.find(play.key) if play.is_journaled else None
            if known is not None and "ids" not in known:
                self._answered.append((play, known, False))
            elif known is not None and not self.environment.repeatable:
                self._answered.append((play, {"interrupted": UNDER_WAY}, True))
            else:
                asked.append((play, play.asks(completion, self.read_calls)))
                if play.is_journaled:
                    entries.append({"key": play.key, "ids": completion.token_ids})
        if entries:
            self.journal.append(entries)
        for play, turn in asked:
            self._asking[self._threads.submit(self._step, play, turn)] = play

    def _step(self, play: Play, turn: Turn) -> Reply:
        """Runs in a thread: returns the episode's answer, after opening it at first or after a kill."""
        if play.episode is None:
            if turn.number and play.state is None:
                raise Interrupted
            row = {**play.prompt.columns, "prompt": play.prompt.messages or play.prompt.text}
            play.episode = self.environment.open(row, play.seed, play.state)
        return checked_reply(play.episode.step(turn), turn.calls or ())

    def _take_answers(self) -> None:
        """Writes answers into the journal, and only then uses them."""
        known, self._answered = self._answered, []
        for future in [future for future in self._asking if future.done()]:
            play = self._asking.pop(future)
            if play.is_dropped:
                self._close(play)
            else:
                known.append((play, _outcome(future), True))
        new = [{"key": play.key, **entry} for play, entry, is_new in known if is_new and play.is_journaled]
        if new:
            self.journal.append(new)
        going_on = [play for play, entry, _ in known if self._took(play, entry)]
        replies = [play.shown for play in going_on]
        for play, step in zip(going_on, self.render.follow([p.talk for p in going_on], replies), strict=True):
            if play.add_step(step):
                self._ready.append(play)
            else:
                self._end(play, "length", "tokens")

    def _took(self, play: Play, entry: Mapping[str, Any]) -> bool:
        """Takes an answer; returns whether the episode goes on."""
        if "reply" not in entry:
            self._fail(play, {name: entry[name] for name in ("fault", "interrupted") if name in entry})
            return False
        reply = Reply(**entry["reply"])
        shown = [self.render.shown(message) for message in reply.messages]
        play.shown = [message for message, _ in shown]
        play.counts["cut_answers"] += sum(is_cut for _, is_cut in shown)
        play.add_reply(reply)
        if reply.done:
            self._end(play, "stop", "")
        elif play.turn + 1 >= self.rules.max_turns:
            self._end(play, "length", "turns")
        return not reply.done and play.turn + 1 < self.rules.max_turns

    def _fail(self, play: Play, why: Mapping[str, str]) -> None:
        """Lets the episode abstain. The engine aborted a turn, the environment failed ("fault"), or a kill
        interrupted what cannot be resumed ("interrupted"); that is nobody's fault.
        """
        completion = aborted()
        completion.facts = {**self.facts, **why, "said": play.said}
        self._put(play, completion)

    def _end(self, play: Play, reason: FinishReason, limit: str) -> None:
        self._count()
        seconds, self._seconds = [round(s, 4) for s in self._seconds], [0.0, 0.0]
        self._put(play, play.completion(reason, {**self.facts, "limit": limit, "seconds": seconds}))

    def _put(self, play: Play, completion: Completion) -> None:
        playing = next(playing for playing in self._playing if play in playing.plays)
        playing.done[play.index] = completion
        if len(playing.done) == len(playing.plays):
            self._playing.remove(playing)
            self._finished.append(playing)
        self._close(play)

    def _close(self, play: Play) -> None:
        if play.episode is not None:
            with suppress(RuntimeError):  # the threads have ended, and the environment with them
                closing = [future for future in self._closing if not future.done()]
                self._closing = [*closing, self._threads.submit(play.episode.close)]


def _outcome(future: Future[Reply]) -> dict[str, Any]:
    """A journal's entry for an answer, or for why there is none."""
    error = future.exception()
    if error is None:
        return {"reply": asdict(future.result())}
    if isinstance(error, Interrupted):
        return {"interrupted": STATELESS}
    told = str(error) if isinstance(error, EnvironmentFault) else f"{type(error).__name__}: {error}"
    return {"fault": told[:500]}
