"""The ledger: every completion comes back as it was, or the record counts as absent and says so."""

import contextlib
import gzip
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rl.run import Run
from rl.store.ledger import Ledger
from rl.types import (
    Completion,
    Continuation,
    Group,
    Prompt,
    Reason,
    Reward,
    ScoredGroup,
    Segment,
    VersionSpan,
)

# Line separators, quotes, control characters, a lone surrogate, two surrogates that must not become one
# character, an astral character, and what ends a JSON line.
HOSTILE = 'a\u2028b\u2029"c\\\0\x1b[31m\r\n\ud800 \udfff \ud83d\ude00 \U0001f600 </script>\x85\ufeff'


def float32(value: float) -> float:
    return struct.unpack("<f", struct.pack("<f", value))[0]


def scored_group(seed: int, *, num_completions: int = 3) -> ScoredGroup:
    draw = random.Random(seed)
    completions, rewards = [], []
    for i in range(num_completions):
        length = draw.randrange(6)
        completions.append(
            Completion(
                token_ids=[draw.randrange(50_000) for _ in range(length)],
                behavior_logprobs=[float32(-draw.expovariate(1)) for _ in range(length)],
                loss_mask=[draw.random() < 0.5 for _ in range(length)] if i % 2 else [True] * length,
                finish_reason=draw.choice(["stop", "length", "abort"]),
                version_spans=[VersionSpan(seed, length // 2), VersionSpan(seed + 1, length - length // 2)],
                text=HOSTILE,
            )
        )
        score = draw.choice([None, 0.1 + 0.2, -0.0, 1])
        rewards.append(Reward(score, draw.choice(list(Reason)), HOSTILE, None, 0.25, {"a": 1 / 3, "b": None}))
    prompt = Prompt(
        f"train/{seed:06d}",
        HOSTILE,
        tuple(range(seed, seed + 4)),
        ({"role": "user", "content": HOSTILE},),
        {"answer": HOSTILE, "n": [1, None, {"deep": 1e-300}], "big": 2**70},
    )
    return ScoredGroup(Group(prompt, completions), rewards)


def write(ledger: Ledger, step: int, *groups: ScoredGroup, **changes) -> Path:
    fields = {"cursor_before": 8 * step, "cursor_after": 8 * step + 8, "policy_version": step}
    return ledger.write(step, groups or [scored_group(step)], **{**fields, **changes})


def test_a_step_comes_back_exactly(tmp_path):
    groups, rejected = [scored_group(seed) for seed in range(20)], [scored_group(99)]
    advantages = [[1 / 3, -0.5, float32(1e-38)] for _ in groups]
    path = Ledger(tmp_path, 1, 2).write(
        12,
        groups,
        cursor_before=96,
        cursor_after={"epoch": 1, "ordinal": 8},
        policy_version=11,
        rejected=rejected,
        advantages=advantages,
        counts={"rounds": 2.0},
    )
    assert path == tmp_path / "ledger" / "step-000012-rank1.jsonl.gz"
    step = Ledger(tmp_path, 1, 2).read(12)
    assert step is not None
    assert (step.groups, step.rejected, step.advantages) == (groups, rejected, advantages)
    assert (step.step, step.rank, step.world_size, step.policy_version) == (12, 1, 2, 11)
    assert (step.cursor_before, step.cursor_after) == (96, {"epoch": 1, "ordinal": 8})
    assert step.counts == {"rounds": 2.0}
    # -0.0 == 0.0, so equality above does not see the sign.
    scores = [
        (a.score, b.score)
        for g, h in zip(groups, step.groups, strict=True)
        for a, b in zip(g.rewards, h.rewards, strict=True)
    ]
    assert all(repr(a) == repr(b) for a, b in scores) and "-0.0" in {repr(a) for a, _ in scores}


def test_a_record_that_is_written_beside_the_caller_is_whole_once_it_is_settled(tmp_path):
    ledger = Ledger(tmp_path)
    given = {"cursor_before": 0, "cursor_after": 8, "policy_version": 0}
    ledger.settle()  # nothing was begun
    for step in range(3):
        ledger.begin(step, [scored_group(step)], **given)
    ledger.settle()
    records = [Ledger(tmp_path).read(step) for step in range(3)]
    assert [r and r.groups for r in records] == [[scored_group(step)] for step in range(3)]
    ledger.begin(3, [scored_group(3)], advantages=[[math.nan] * 3], **given)
    with pytest.raises(ValueError, match=r"step 3, prompt .*advantages"):
        ledger.settle()
    ledger.settle()  # it was said once
    assert ledger.steps() == [0, 1, 2]


def test_without_advantages_and_without_groups_nothing_is_invented(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.write(1, [], cursor_before=0, cursor_after=0, policy_version=0)
    write(ledger, 2)
    first, second = ledger.read(1), ledger.read(2)
    assert first is not None and (first.groups, first.advantages) == ([], None)
    assert second is not None and second.advantages is None


@pytest.mark.parametrize(
    "logprobs",
    [
        # Smallest subnormal, smallest normal and largest float32, negative zero, a third rounded to float32.
        [-(2.0**-149), -(2.0**-126), -3.4028234663852886e38, -0.0, -0.3333333432674408],
        # No float32: kept as float64.
        [-1 / 3, -1e-300, -1e300],
        [],
    ],
)
def test_behavior_logprobs_come_back_bit_for_bit(tmp_path, logprobs):
    group = scored_group(0, num_completions=1)
    completion = group.completions[0]
    completion.behavior_logprobs = logprobs
    ledger = Ledger(tmp_path)
    write(ledger, 1, group)
    step = ledger.read(1)
    assert step is not None
    back = step.groups[0].completions[0].behavior_logprobs
    assert [struct.pack("<d", x) for x in back] == [struct.pack("<d", x) for x in logprobs]
    assert all(type(x) is float for x in back)


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i4"])
def test_routes_come_back_as_arrays(tmp_path, dtype):
    group = scored_group(0, num_completions=1)
    group.completions[0].routes = np.arange(24).reshape(2, 3, 4).astype(dtype).transpose(1, 0, 2)
    ledger = Ledger(tmp_path)
    write(ledger, 1, group)
    step = ledger.read(1)
    assert step is not None
    routes = step.groups[0].completions[0].routes
    assert routes.shape == (3, 2, 4) and routes.dtype == np.dtype(dtype).newbyteorder("<")
    assert routes[1, 0].tolist() == [4, 5, 6, 7] and routes[1, 1].tolist() == [16, 17, 18, 19]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nothing_non_finite_is_recorded_and_the_error_says_where(tmp_path, value):
    ledger = Ledger(tmp_path)
    group = scored_group(7)
    group.completions[1].behavior_logprobs = [-1.0, value]
    where = rf"ledger, step 3, prompt 'train/000007', completion 1: behavior_logprobs\[1\] is {value}"
    with pytest.raises(ValueError, match=where):
        write(ledger, 3, group)
    group = scored_group(7)
    group.rewards[2] = Reward(value)
    with pytest.raises(
        ValueError, match=f"completion 2: reward score is {value}; graders and advantages give"
    ):
        write(ledger, 3, group)
    group.rewards[2] = Reward(1.0, parts={"format": value})
    with pytest.raises(ValueError, match=f"completion 2: reward format is {value}"):
        write(ledger, 3, group)
    with pytest.raises(ValueError, match=f"prompt 'train/000007': advantages is {value}"):
        write(ledger, 3, scored_group(7), advantages=[[0.0, value, 0.0]])
    with pytest.raises(ValueError, match="prompt 'x': Out of range float values"):
        write(ledger, 3, ScoredGroup(Group(Prompt("x", "", (), columns={"gold": value}), []), []))
    assert ledger.steps() == [] and list(ledger.folder.iterdir()) == []


def test_values_that_are_not_json_and_lengths_that_disagree_are_refused(tmp_path):
    ledger = Ledger(tmp_path)
    odd = ScoredGroup(Group(Prompt("x", "", (), columns={"when": {1}}), []), [])
    with pytest.raises(ValueError, match=r"step 1, prompt 'x': Object of type set .* hold JSON values only"):
        write(ledger, 1, odd)
    with pytest.raises(ValueError, match="step 1: Object of type set"):
        write(ledger, 1, cursor_after={1})
    group = scored_group(1)
    group.rewards.pop()
    with pytest.raises(AssertionError, match="2 rewards"):
        write(ledger, 1, group)
    with pytest.raises(AssertionError, match="each group has a list of advantages"):
        write(ledger, 1, scored_group(1), advantages=[[0.0], [0.0]])
    assert list(ledger.folder.iterdir()) == []


def test_each_line_is_json_that_other_programs_can_read(tmp_path):
    import json

    group = ScoredGroup(Group(Prompt("x", "line\u2028end", (1,)), []), [])
    path = write(Ledger(tmp_path), 1, group)
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]][1]["prompt"]["text"] == "line\u2028end"
    assert lines[-1] == "" and len(lines) == 3


def test_an_absent_step_is_none_and_no_fault(tmp_path):
    ledger = Ledger(tmp_path)
    assert (ledger.read(1), ledger.steps(), ledger.read_all(1), ledger.damaged) == (None, [], None, [])
    assert list(ledger.sample(5)) == []


def test_a_step_written_again_is_replaced(tmp_path):
    ledger = Ledger(tmp_path)
    write(ledger, 1, scored_group(1))
    write(ledger, 1, scored_group(2))
    step = ledger.read(1)
    assert step is not None and step.groups == [scored_group(2)]


def test_a_truncated_or_changed_record_counts_as_absent_and_is_reported(tmp_path):
    path = write(Ledger(tmp_path), 5)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        ledger = Ledger(tmp_path)
        assert ledger.read(5) is None
        assert ledger.read(5) is None
        [sentence] = ledger.damaged
        assert sentence.startswith("step-000005-rank0.jsonl.gz: damaged (")
    # The 10 bytes of the gzip header carry a time and flags; all after them is covered by its CRC.
    for at in range(10, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert Ledger(tmp_path).read(5) is None


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda text: text.replace(b'"rows":1', b'"rows":2'), "1 rows, the header says 2"),
        (
            lambda text: text.replace(b'"schema":2', b'"schema":9'),
            "schema 9, this version of cohort reads 1 and 2",
        ),
        (lambda text: text.replace(b'"reward"', b'"rewart"'), "KeyError: 'reward'"),
        (lambda text: b"[]\n", "TypeError"),
        (lambda text: b"", "JSONDecodeError"),
    ],
)
def test_a_whole_file_with_other_contents_is_reported_too(tmp_path, edit, reason):
    path = write(Ledger(tmp_path), 5)
    path.write_bytes(gzip.compress(edit(gzip.decompress(path.read_bytes()))))
    ledger = Ledger(tmp_path)
    assert ledger.read(5) is None
    assert len(ledger.damaged) == 1 and reason in ledger.damaged[0]


def in_child(action) -> int:
    """Wait status of a fork that runs `action`."""
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def test_a_writer_killed_at_any_point_leaves_the_step_whole_or_absent(tmp_path):
    write(Ledger(tmp_path), 1)
    size = len((tmp_path / "ledger" / "step-000001-rank0.jsonl.gz").read_bytes())

    def killed_by_kernel(limit: int) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        write(Ledger(tmp_path), 2, scored_group(1))

    for limit in range(0, size, 100):
        assert os.WTERMSIG(in_child(lambda limit=limit: killed_by_kernel(limit))) == signal.SIGXFSZ
        ledger = Ledger(tmp_path)
        assert (ledger.steps(), ledger.read(2), ledger.damaged) == ([1], None, [])

    def killed_at_rename() -> None:
        hook = lambda event, _: event == "os.rename" and os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        sys.addaudithook(hook)
        write(Ledger(tmp_path), 2, scored_group(1))

    assert os.WTERMSIG(in_child(killed_at_rename)) == signal.SIGKILL
    assert Ledger(tmp_path).steps() == [1]
    write(Ledger(tmp_path), 2)
    assert sorted(path.name for path in (tmp_path / "ledger").iterdir()) == [
        "step-000001-rank0.jsonl.gz",
        "step-000002-rank0.jsonl.gz",
    ]


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    write(Ledger(tmp_path), 1)

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="File too large"):
            write(Ledger(tmp_path), 2, *[scored_group(n) for n in range(9)])

    assert in_child(full) == 0
    assert [path.name for path in (tmp_path / "ledger").iterdir()] == ["step-000001-rank0.jsonl.gz"]


def test_all_ranks_of_a_step_are_read_together_or_not_at_all(tmp_path):
    ranks = [Ledger(tmp_path, rank, 2) for rank in range(2)]
    write(ranks[0], 3, scored_group(1))
    assert Ledger(tmp_path).read_all(3) is None
    write(ranks[1], 3, scored_group(2))
    both = Ledger(tmp_path).read_all(3)
    assert both is not None and [step.groups for step in both] == [[scored_group(1)], [scored_group(2)]]
    assert ranks[1].steps() == [3] and Ledger(tmp_path, 2, 3).steps() == []


def test_records_of_two_processes_are_dealt_to_one_and_to_four(tmp_path):
    """Round: 1 and 3 of process 0, 2 and 4 of process 1 are 1, 2, 3, 4."""
    for rank, numbers in enumerate(((1, 3), (2, 4))):
        groups = [scored_group(n) for n in numbers]
        kept = {"advantages": [[float(n)] * len(scored_group(n).completions) for n in numbers]}
        counts = {"replaced": 1.0 + rank, "rounds": 2.0}
        write(Ledger(tmp_path, rank, 2), 5, *groups, rejected=[scored_group(7 + rank)], counts=counts, **kept)
    alone = Ledger(tmp_path).read(5)
    assert alone is not None and alone.groups == [scored_group(n) for n in (1, 2, 3, 4)]
    assert alone.rejected == [scored_group(7), scored_group(8)]
    assert alone.advantages is not None and [row[0] for row in alone.advantages] == [1.0, 2.0, 3.0, 4.0]
    assert alone.counts == {"replaced": 3.0, "rounds": 4.0} and alone.world_size == 2
    four = [Ledger(tmp_path, rank, 4).read(5) for rank in range(4)]
    assert [share.groups for share in four if share] == [[scored_group(n)] for n in (1, 2, 3, 4)]
    assert [share.rejected for share in four if share] == [[scored_group(7)], [scored_group(8)], [], []]
    assert [share.counts["replaced"] for share in four if share] == [3.0, 0.0, 0.0, 0.0]
    # Where a share is lost, none can be dealt.
    (tmp_path / "ledger" / "step-000005-rank1.jsonl.gz").unlink()
    one, second_of_two = Ledger(tmp_path), Ledger(tmp_path, 1, 2)
    assert one.read(5) is None and second_of_two.read(5) is None
    name = "step-000005-rank0.jsonl.gz"
    assert one.damaged == [f"{name}: not all 2 processes' records of that step are whole"]


def test_shares_of_different_tries_are_not_dealt(tmp_path):
    """A run of one process was killed after it had recorded a step anew, before the old share was removed."""
    write(Ledger(tmp_path, 0, 2), 5, scored_group(1), cursor_before=8)
    write(Ledger(tmp_path, 1, 2), 5, scored_group(2), cursor_before=4)
    assert Ledger(tmp_path).read(5) is None


@pytest.mark.parametrize(("sizes", "is_taken"), [([1, 2], False), ([1, None], False), ([1, 1], True)])
def test_a_step_is_repeated_only_where_all_processes_hold_shares_of_one_record(tmp_path, sizes, is_taken):
    """One process recorded step 5 anew and was killed before it removed the second's old share."""
    write(Ledger(tmp_path, 0, 1), 5, *[scored_group(n) for n in (1, 2)], cursor_before=8)
    write(Ledger(tmp_path, 1, 2), 5, scored_group(2), cursor_before=8)
    shares = [Ledger(tmp_path, rank, 2).read(5) for rank in (0, 1)]
    assert [share.world_size for share in shares if share] == [1, 2]
    run: Any = SimpleNamespace(
        ledger=Ledger(tmp_path, 0, 2), source=SimpleNamespace(cursor=8), num_recorded=0
    )
    run.world = SimpleNamespace(gather=lambda mine: [mine, sizes[1]])
    assert (Run.recorded(run, 5) is not None) == is_taken


def test_a_sample_of_steps_is_even_and_has_both_ends(tmp_path):
    for rank in range(2):
        for step in range(0, 50, 5):
            write(Ledger(tmp_path, rank, 2), step)
    ledger = Ledger(tmp_path)
    # 4 of the 10 steps 0, 5, ..., 45: every third.
    found = [(record.step, record.rank) for record in ledger.sample(4)]
    assert found == [(step, rank) for step in (0, 15, 30, 45) for rank in (0, 1)]
    assert [record.step for record in ledger.sample(1)] == [45, 45]
    assert len(list(ledger.sample(100))) == 20
    (ledger.folder / "step-000045-rank1.jsonl.gz").write_bytes(b"")
    assert [record.rank for record in ledger.sample(1)] == [0]
    assert len(ledger.damaged) == 1


def test_a_step_of_256_completions_of_1000_tokens_is_a_few_megabytes(tmp_path):
    generator = np.random.default_rng(0)
    groups = []
    for index in range(32):
        completions = [
            Completion(
                token_ids=(generator.zipf(1.3, 1000) % 50_000).tolist(),
                behavior_logprobs=(-generator.exponential(0.5, 1000)).astype("float32").tolist(),
                loss_mask=[True] * 1000,
                finish_reason="length",
                version_spans=[VersionSpan(0, 1000)],
                text="word " * 800,
            )
            for _ in range(8)
        ]
        groups.append(ScoredGroup(Group(Prompt(str(index), "q", (1,)), completions), [Reward(1.0)] * 8))
    ledger = Ledger(tmp_path)
    assert write(ledger, 1, *groups).stat().st_size < 3e6
    step = ledger.read(1)
    assert step is not None and step.groups == groups


def test_a_step_that_is_sampled_again_by_fewer_processes_has_no_share_of_the_others(tmp_path):
    for rank in (0, 1):
        for step in (0, 1):
            write(Ledger(tmp_path, rank, 2), step)
    write(Ledger(tmp_path, 0, 1), 1)
    assert Ledger(tmp_path).recorded() == {0: [0, 1], 1: [0]}


def test_a_step_lists_no_folder_however_many_there_were(tmp_path):
    """Listing a folder raises an audit event: a process has one, at its first write."""
    write(Ledger(tmp_path), 0)
    ledger, listed = Ledger(tmp_path), []
    events = ("os.listdir", "os.scandir")
    sys.addaudithook(lambda event, args: listed.append(str(args[0])) if event in events else None)
    for step in range(1, 20):
        write(ledger, step)
        assert ledger.read(step + 1) is None
    assert [path for path in listed if path.startswith(str(tmp_path))] == [str(ledger.folder)]


def test_a_ledger_that_was_taken_away_is_an_error_and_not_made_anew(tmp_path):
    ledger = Ledger(tmp_path / "run")
    write(ledger, 0)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match="run/ledger is gone"):
        write(ledger, 1)
    assert not (tmp_path / "run").exists()


def test_segments_facts_continuations_turns_and_advantages_per_token_come_back(tmp_path):
    later = Completion([7], [-1.0], [True], "stop", [VersionSpan(2, 1)], "c", facts={"seconds": 0.5})
    episode = Completion(
        [5, 6],
        [-0.5, 0.0],
        [True, False],
        "stop",
        [VersionSpan(1, 2)],
        "a b",
        segments=[Segment("sampled", 1), Segment("tool", 1)],
        facts={"tool": {"name": "python", "output": HOSTILE}, "trace": {"steps": [0, 1]}},
        continuations=[Continuation((1, 2, 3), later)],
    )
    group = ScoredGroup(Group(Prompt("p", "", (1,)), [episode]), [Reward(1.0, turns=(0.25, None))])
    write(Ledger(tmp_path), 0, group, advantages=[[[0.5, -0.5]]])
    found = Ledger(tmp_path).read(0)
    assert found is not None and found.groups == [group] and found.advantages == [[[0.5, -0.5]]]


@pytest.mark.parametrize(
    "broken",
    [
        Completion([5], [-0.5], [True], "stop", [], segments=[Segment("sampled", 2)]),
        Completion([5], [-0.5], [True], "stop", [], segments=[Segment("model", 1)]),  # type: ignore[arg-type]
        Completion([5], [-0.5], [True], "stop", [], facts=[1]),  # type: ignore[arg-type]
    ],
)
def test_segments_and_facts_of_another_kind_are_damage(tmp_path, broken):
    ledger = Ledger(tmp_path)
    with contextlib.suppress(ValueError, TypeError):
        write(ledger, 0, ScoredGroup(Group(Prompt("p", "", (1,)), [broken]), [Reward(1.0)]))
        assert ledger.read(0) is None and "damaged" in ledger.damaged[0]


def test_a_record_of_an_earlier_release_is_read_with_its_trace_among_the_facts(tmp_path):
    """Written by commit 0bb4cc6^, when a trace was a field of its own."""
    (tmp_path / "ledger").mkdir()
    golden = Path(__file__).parents[1] / "golden/ledger_before_facts.jsonl.gz"
    shutil.copy(golden, tmp_path / "ledger/step-000007-rank0.jsonl.gz")
    found = Ledger(tmp_path).read(7)
    assert found is not None
    assert (found.cursor_before, found.cursor_after) == ({"next": 3, "pending": [1]}, 9)
    assert (found.policy_version, found.advantages, found.counts) == (4, [[0.5, 0.0]], {"rounds": 1.0})
    first, second = found.groups[0].completions
    assert first.facts == {
        "trace": {"steps": [0, 2, 1, 3], "tail_ids": [9], "num_steps": 3, "pieces": ["a", "b", "c"]}
    }
    assert (first.token_ids, first.loss_mask) == ([5, 6, 7], [True, True, False])
    assert first.version_spans == [VersionSpan(3, 2), VersionSpan(4, 1)]
    assert (second.text, second.facts, second.segments) == ("d \ud800", {}, [])
    assert [r.score for r in found.groups[0].rewards] == [1.0, None]
    assert found.groups[0].rewards[0].turns == ()
