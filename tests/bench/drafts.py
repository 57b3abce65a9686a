"""What speculation with drafts would save on recorded completions: acceptance, and seconds of a burst.

    python -m tests.bench.drafts RUN [RUN ...] [--steps 3] [--step-share 0.59] [--running 256]

A draft that is one fixed token x is accepted with probability p(x), and a rejected one is replaced by a draw
from p without x. So a completion that was sampled from p is one that speculation could have given, and the
drafts it would have accepted are those that equal its tokens: no engine is needed.

Drafts continue the longest match of the last tokens (`MIN_MATCH` to `MAX_MATCH`), by the most frequent next
token among equally long matches, as suffix decoding does (arXiv:2411.04975). They are taken from "own", the
prompt and the completion so far; "siblings", other completions of the group, as far as each was sampled by
then; "earlier", completions of the same prompt in earlier epochs of the run; and "all".

Seconds are those of W's 1.5B model on one H200 (`tests.bench.tail`). All completions of a step start
together, and drafts of k tokens are verified while at most N run, for the best N and k. What a step of n
completions then takes is bounded from both sides. "roofline": what one of n takes, and the arithmetic of its
n * (k + 1) rows as far as reading the weights does not hide it; a completion's rows read its keys and values
once. "measured": what one of n * (k + 1) completions took. "+0.5": with as many ms more for the host, which
must know the accepted tokens before it prepares the next step, and does so meanwhile without drafts. "less"
is the share of a whole step's seconds. Workload W's lengths are drawn, and for each of their positions the
accepted tokens of some position that was recorded. Last come made-up drafts, whose tokens are all accepted
with the same probability.

No draft does better than "limit": a token is accepted with at most max p <= sqrt(sum p^2), and the mean of
sum p^2 is that of the probabilities of the sampled tokens.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from rl.store.ledger import Ledger
from tests.bench.tail import STEP_MS, interpolated, length
from tests.bench.workload import Workload

MIN_MATCH, MAX_MATCH, MAX_DRAFT = 2, 16, 8
KS = (1, 2, 4, 8)
READ_MS, ROW_MS = 3.1e9 / 4.8e12 * 1e3, 2 * 1.54e9 / (0.6 * 989e12) * 1e3  # the shape 1.5b on an H200
PRICES = (("roofline", 0.0), ("roofline", 0.5), ("measured", 0.0), ("measured", 0.5))
HEAD = "lengths     drafts         s" + "".join(
    f"   {price + (f' +{ms}' if ms else ''):14}" for price, ms in PRICES
)
Burst = list[dict[str, np.ndarray]]
SOURCES = {"own": {0}, "siblings": {1}, "earlier": {2}, "all": {0, 1, 2}}


@dataclass(frozen=True)
class Text:
    """A sequence that drafts are taken from: tokens[begin:] may be drafts. It is known up to `begin` + the
    tokens that the drafting completion has, if it grows, else in full."""

    tokens: list[int]
    begin: int
    grows: bool
    kind: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--steps", type=int, default=3, help="the last ones of each run")
    parser.add_argument("--running", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256], help="N")
    parser.add_argument("--step-share", type=float, default=0.59, help="sampling's part of a step's seconds")
    asked = parser.parse_args()
    for run in asked.runs:
        if not (bursts := list(recorded(run, asked.steps))):
            raise SystemExit(f"{run} has no recorded completion of one turn; give the folder of such a run")
        report(run, bursts, asked)
    print(f"made up\n{HEAD}")
    made_up(asked)


def recorded(run: str, num_steps: int) -> Iterator[Burst]:
    """Per step, for each completion and source: how many draft tokens are accepted at each position, [T].
    "sampled" is the probability of each token, empty where none was recorded."""
    ledger, earlier = Ledger(run), defaultdict(list)
    steps = ledger.steps()
    for step in steps:
        records = ledger.read_all(step) or []
        burst = []
        for scored in (group for record in records for group in record.groups):
            prompt = list(scored.prompt.token_ids)
            whole = [
                c for c in scored.completions if c.token_ids and all(c.loss_mask) and not c.continuations
            ]
            rows = [completion.token_ids for completion in whole]
            for i, completion in enumerate(whole if step in steps[-num_steps:] else ()):
                found = accepted(prompt, rows, i, earlier[scored.prompt.id])
                burst.append(found | {"sampled": np.exp(completion.behavior_logprobs)})
            earlier[scored.prompt.id] += rows
        if burst:
            yield burst


def accepted(
    prompt: list[int], group: Sequence[list[int]], mine: int, earlier: Sequence[list[int]]
) -> dict[str, np.ndarray]:
    """Tokens of the draft at each position of completion `mine` that equal what was sampled, per source."""
    full, start = prompt + group[mine], len(prompt)
    texts = [Text(full, 0, True, 0)]
    texts += [Text(prompt + row, start, True, 1) for i, row in enumerate(group) if i != mine]
    texts += [Text(prompt + row, start, False, 2) for row in earlier]
    places: dict[tuple[int, ...], list[tuple[Text, int]]] = defaultdict(list)
    for text in texts:
        for at in range(max(text.begin, MIN_MATCH), len(text.tokens)):
            places[tuple(text.tokens[at - MIN_MATCH : at])].append((text, at))
    found = {source: np.zeros(len(group[mine]), dtype=int) for source in SOURCES}
    for position in range(start, len(full)):
        last = tuple(full[position - MIN_MATCH : position])
        known = [(text, at) for text, at in places[last] if at < position or not text.grows]
        matches = [(matched(text.tokens, at, full, position), text, at) for text, at in known]
        for source, kinds in SOURCES.items():
            some = [match for match in matches if match[1].kind in kinds]
            longest = max((match[0] for match in some), default=0)
            best = [(text, at) for size, text, at in some if size == longest]
            found[source][position - start] = agreement(best, full, position)
    return found


def matched(tokens: list[int], at: int, full: list[int], position: int) -> int:
    size = MIN_MATCH
    while size < min(MAX_MATCH, at, position) and tokens[at - size - 1] == full[position - size - 1]:
        size += 1
    return size


def agreement(places: list[tuple[Text, int]], full: list[int], position: int) -> int:
    """How many tokens of the draft equal those of `full` from `position`: each is the most frequent next one
    among the places which agreed so far, of equally frequent ones the first. Of a text that grows, what was
    not sampled when `full` had `position` tokens is not known.
    """
    for size in range(min(MAX_DRAFT, len(full) - position)):
        places = [
            (text, at)
            for text, at in places
            if at + size < (min(position, len(text.tokens)) if text.grows else len(text.tokens))
        ]
        if not places:
            return size
        token = Counter(text.tokens[at + size] for text, at in places).most_common(1)[0][0]
        if token != full[position + size]:
            return size
        places = [(text, at) for text, at in places if text.tokens[at + size] == token]
    return min(MAX_DRAFT, len(full) - position)


def seconds(burst: Sequence[np.ndarray], k: int, max_running: int, price: str, overhead_ms: float) -> float:
    """Seconds until the last completion of a burst is done, with drafts while at most `max_running` run."""
    lengths = np.array([len(values) for values in burst])
    table = np.zeros((len(burst), lengths.max() + 1), dtype=int)
    for line, values in zip(table, burst, strict=True):
        line[: len(values)] = values
    at, every, total = np.zeros(len(burst), dtype=int), np.arange(len(burst)), 0.0
    while len(every):
        drafts = k if len(every) <= max_running else 0
        total += step_ms(len(every), drafts, price) + (overhead_ms if drafts else 0)
        at[every] += 1 + np.minimum(table[every, at[every]], drafts)
        every = every[at[every] < lengths[every]]
    return total / 1e3


def step_ms(running: int, drafts: int, price: str) -> float:
    rows = running * (drafts + 1)
    if price == "measured":
        return interpolated(rows, STEP_MS)
    return interpolated(running, STEP_MS) + max(0.0, rows * ROW_MS - max(READ_MS, running * ROW_MS))


def as_w(pool: np.ndarray, draw: random.Random) -> list[np.ndarray]:
    """A burst with W's lengths, whose accepted tokens are drawn from `pool`."""
    w = Workload()
    lengths = [length(w, draw) for _ in range(w.prompts * w.group)]
    return [np.array(draw.choices(pool, k=size), dtype=int) for size in lengths]


def report(run: str, bursts: list[Burst], asked: argparse.Namespace) -> None:
    rows = [row for burst in bursts for row in burst]
    sizes = np.array([len(row["all"]) for row in rows])
    print(f"{run}: {len(bursts)} steps, {len(rows)} completions of {sizes.mean():.0f} tokens on average")
    print(f"{'drafts from':12}accepted at position 1..8, % of positions       tokens a step, k = 2 4 8")
    for source in SOURCES:
        pool = np.concatenate([row[source] for row in rows])
        shares = "".join(f"{np.mean(pool >= n):5.0%}" for n in range(1, MAX_DRAFT + 1))
        print(
            f"{source:12}{shares}{'':11}"
            + "".join(f"{1 + np.minimum(pool, k).mean():6.2f}" for k in (2, 4, 8))
        )
    if len(sampled := np.concatenate([row["sampled"] for row in rows])):
        print(f"{'limit':12}{np.sqrt(sampled.mean()):5.0%}")
    draw = random.Random(0)
    print(HEAD)
    for source in SOURCES:
        pool = np.concatenate([row[source] for row in rows])
        recorded_lengths = [[row[source] for row in burst] for burst in bursts]
        print(f"{'recorded':12}{source:9}{best(recorded_lengths, asked)}")
        print(f"{'W':12}{source:9}{best([as_w(pool, draw) for _ in range(3)], asked)}", flush=True)


def made_up(asked: argparse.Namespace) -> None:
    draw = random.Random(0)
    for share in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        pool = np.random.default_rng(0).geometric(1 - share, 100_000) - 1
        bursts = [as_w(np.minimum(pool, MAX_DRAFT), draw) for _ in range(3)]
        print(f"{'W':12}{share:<9.0%}{best(bursts, asked)}", flush=True)


def best(bursts: list[list[np.ndarray]], asked: argparse.Namespace) -> str:
    """Seconds without drafts, and for each price N, k and the saving's share of a whole step."""
    plain = sum(seconds(burst, 0, 0, "roofline", 0.0) for burst in bursts)
    text = f"{plain / len(bursts):8.2f}"
    for price, overhead_ms in PRICES:
        times = {
            (n, k): sum(seconds(burst, k, n, price, overhead_ms) for burst in bursts)
            for n, k in product(asked.running, KS)
        }
        n, k = min(times, key=times.__getitem__)
        text += f"{n:6}{k:3}{(1 - times[n, k] / plain) * asked.step_share:8.1%}"
    return text


if __name__ == "__main__":
    main()
