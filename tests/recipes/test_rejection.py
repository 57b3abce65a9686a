"""Rejection sampling: what is kept, by hand; the same traces after a kill; traces of files and servers."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pyarrow.parquet
import pytest

from recipes.cli import main as cohort
from recipes.tasks.traces import choose, read_traces, verified
from rl.config import DataConfig, ModelConfig
from rl.config.diffusion import TextConfig
from rl.config.traces import TracesConfig
from rl.diffusion.text import encode_rows
from rl.model.loading import load_tokenizer
from rl.store.folder import write_config
from rl.store.ledger import Ledger
from rl.types import Call, Completion, Group, Prompt, Reason, Reward, SamplingParams, ScoredGroup

ROOT = Path(__file__).parents[2]


def rows_of(run_dir: Path) -> list[dict]:
    return pyarrow.parquet.read_table(run_dir / "traces.parquet").to_pylist()


def test_traces_are_verified_each_once_and_read_by_fine_tuning(
    traces_config, tiny_model_dir, tmp_path, capsys
):
    assert cohort(["sample", str(traces_config)]) == 0
    out = capsys.readouterr().out
    assert "record 4 of 4: " in out and "completions/s" in out and "% verified" in out
    rows, result = rows_of(tmp_path / "traces"), json.loads((tmp_path / "traces/result.json").read_text())
    assert len(rows) == result["kept"] > 12 and result["completions"] == 96
    # counted again from the ledger by this test's own rule
    ledger = Ledger(tmp_path / "traces")
    groups = [group for step in ledger.steps() for group in ledger.read(step).groups]
    expected = []
    for group in groups:
        right = [
            (i, c.text)
            for i, (c, r) in enumerate(zip(group.completions, group.rewards, strict=True))
            if r.score == 1.0 and c.finish_reason == "stop"
        ]
        expected += [(group.prompt.id, i, text) for i, text in right][:4]
    assert [(r["prompt_id"], r["sample"], r["completion"][0]["content"]) for r in rows] == expected
    assert rows[0]["prompt"] == [{"role": "user", "content": "What is w0 ?"}]
    origin = json.loads(rows[0]["provenance"])
    assert origin["model"] == str(tiny_model_dir) and origin["seed"] == 5
    assert origin["sampler"]["max_completion_length"] == 24 and "torch" in origin["inputs"]["versions"]
    # what fine-tuning trains on begins with what was sampled from, token for token
    tokenizer = load_tokenizer(ModelConfig(name=str(tiny_model_dir)))
    file = str(tmp_path / "traces/traces.parquet")
    examples, dropped = encode_rows(rows, TextConfig(source=file), tokenizer)
    by_id = {group.prompt.id: group for group in groups}
    assert dropped == 0 and len(examples) == len(rows)
    for row, example in zip(rows, examples, strict=True):
        group = by_id[row["prompt_id"]]
        assert tuple(example.prompt) == group.prompt.token_ids
    assert cohort(["sample", str(traces_config)]) == 0
    assert "already finished" in capsys.readouterr().out


def test_a_record_that_is_lost_or_torn_is_sampled_again_to_the_same_bytes(traces_config, tmp_path):
    assert cohort(["sample", str(traces_config)]) == 0
    run = tmp_path / "traces"
    traces, torn = (run / "traces.parquet").read_bytes(), run / "ledger/step-000003-rank0.jsonl.gz"
    (run / "ledger/step-000001-rank0.jsonl.gz").unlink()
    torn.write_bytes(torn.read_bytes()[:100])
    (run / "result.json").unlink()
    (run / "traces.parquet").unlink()
    kept = (run / "ledger/step-000000-rank0.jsonl.gz").stat().st_mtime_ns
    assert cohort(["sample", str(traces_config)]) == 0
    assert (run / "traces.parquet").read_bytes() == traces
    assert (run / "ledger/step-000000-rank0.jsonl.gz").stat().st_mtime_ns == kept  # not sampled twice


@pytest.mark.rotation
def test_two_processes_write_the_traces_of_one(traces_config, tmp_path):
    assert cohort(["sample", str(traces_config)]) == 0
    words = [sys.executable, "-m", "recipes.cli", "sample", str(traces_config), "--processes", "2"]
    done = subprocess.run([*words, f"run_dir={tmp_path / 'two'}"], cwd=ROOT, capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    one, two = ((tmp_path / name / "traces.parquet").read_bytes() for name in ("traces", "two"))
    assert one == two and Ledger(tmp_path / "two").steps() == [0, 1, 2, 3]


def test_other_choices_take_the_same_completions_and_other_samplers_are_refused(
    traces_config, tmp_path, capsys, monkeypatch
):
    assert cohort(["sample", str(traces_config)]) == 0
    one, several = "sample.max_per_prompt=1", rows_of(tmp_path / "traces")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "traces/ledger").iterdir()}
    assert cohort(["sample", str(traces_config), one]) == 0
    firsts = {row["prompt_id"]: row["sample"] for row in reversed(several)}
    assert {row["prompt_id"]: row["sample"] for row in rows_of(tmp_path / "traces")} == firsts
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "traces/ledger").iterdir()}
    two = ["sample", str(traces_config), "sample.max_per_prompt=2", "rewards.max_fault_share=0.5"]

    def killed(config):
        write_config(config)
        raise OSError("as if killed")

    with monkeypatch.context() as patch:
        patch.setattr("recipes.rejection.write_config", killed)
        assert cohort(two) == 1
    assert cohort(two) == 0 and len(rows_of(tmp_path / "traces")) > len(firsts)
    assert cohort(["sample", str(traces_config), "sampling.temperature=0.5"]) == 1
    assert "sampling.temperature: 1.0 there, 0.5 now" in capsys.readouterr().err


def scored(name: str, *samples: tuple[str, float | None, str]) -> ScoredGroup:
    """A group of (text, score, finish reason)."""
    rewards = [
        Reward(s, Reason.SCORED if s is not None else Reason.INFRA_ERROR, parts={"math": s})
        for _, s, _ in samples
    ]
    group = Group(
        Prompt(name, name, (1,)),
        [Completion([1], [], [True], end, [], text=text) for text, _, end in samples],  # pyright: ignore
    )
    return ScoredGroup(group, rewards)


GROUPS = [
    # 3 verified of 3 graded: two texts are one except for white space; no verdict and an abort do not count
    scored(
        "a",
        ("x  y", 1.0, "stop"),
        ("x y\n", 1.0, "stop"),
        ("z", 1.0, "stop"),
        ("q", None, "stop"),
        ("", 0.0, "abort"),
    ),
    # 1 of 2, and the right one was cut off
    scored("b", ("cut", 1.0, "length"), ("no", 0.0, "stop")),
    # 1 of 4
    scored("c", ("yes", 1.0, "stop"), *[("no", 0.0, "stop")] * 3),
    # nobody graded it
    scored("d", ("yes", None, "stop")),
]


def config_of(**sample) -> TracesConfig:
    return TracesConfig.model_validate({"sample": sample})


def test_what_is_kept_and_its_pass_rate_by_hand():
    traces, counts = choose(GROUPS, config_of())
    assert [(t.prompt.id, t.sample, t.text, t.pass_rate) for t in traces] == [
        ("a", 0, "x  y", 1.0),
        ("a", 2, "z", 1.0),
        ("c", 0, "yes", 0.25),
    ]
    assert counts == {
        "prompts": 4,
        "completions": 12,
        "graded": 9,
        "verified": 5,
        "kept": 3,
        "kept_prompts": 2,
        "prompts_with_a_trace": {"up to 1": 2},
    }


def test_rows_of_one_prompt_share_its_texts_and_their_number():
    twice = [scored("a", (t, 1.0, "stop"), ("x", 1.0, "stop"), (f"{t}!", 1.0, "stop")) for t in "xy"]
    assert sorted(t.text for t in choose(twice, config_of())[0]) == ["x", "x!", "y", "y!"]
    assert sorted(t.text for t in choose(twice, config_of(max_per_prompt=3))[0]) == ["x", "x!", "y"]


def test_bands_of_pass_rates_hold_as_many_prompts_as_they_may():
    easy = [scored(f"e{i}", ("yes", 1.0, "stop")) for i in range(10)]
    bands = [[0.5, None], [1.0, 3]]
    traces, counts = choose([*GROUPS, *easy], config_of(bands=bands))
    names = {t.prompt.id for t in traces}
    assert "c" in names and len(names) == 4  # all hard ones, 3 of the 11 easy ones
    assert counts["prompts_with_a_trace"] == {"up to 0.5": 1, "up to 1": 11}
    again, _ = choose([*GROUPS, *easy], config_of(bands=bands, seed=1))
    assert {t.prompt.id for t in again} != names


def test_a_trace_needs_every_named_reward_and_a_verdict_on_each():
    reward = Reward(1.0, parts={"math": 1.0, "think_format": 0.0, "language_consistency": 0.97, "code": None})
    assert verified(reward, {"math": 1.0, "language_consistency": 0.95}) is True
    assert verified(reward, {"math": 1.0, "think_format": 1.0}) is False
    assert verified(reward, {"math": 1.0, "code": 1.0}) is None
    assert verified(reward, {"math": 1.0, "never asked": 1.0}) is None


def test_a_failing_grader_abstains_and_too_many_faults_end_the_run(traces_config, tmp_path, capsys):
    words = ["sample", str(traces_config), "rewards.functions=[{name: 'even_rewards:breaks'}]"]
    assert cohort(words) == 1
    assert "graders failed on 8 of 24 completions" in capsys.readouterr().err
    assert Ledger(tmp_path / "traces").steps() == [0]  # the record with the fault is not written
    assert cohort([*words, "rewards.max_fault_share=0.4", "run_dir=" + str(tmp_path / "b")]) == 0
    assert "which are left out" in capsys.readouterr().out
    result = json.loads((tmp_path / "b/result.json").read_text())
    assert result["prompts"] == 12 and all(
        row["prompt_id"] != "sample/000005" for row in rows_of(tmp_path / "b")
    )
    ledger = Ledger(tmp_path / "b")
    scores = [r.score for step in ledger.steps() for g in ledger.read(step).groups for r in g.rewards]
    assert result["graded"] == sum(score is not None for score in scores) <= 88


def test_traces_of_a_file_are_graded_and_not_sampled(tmp_path, capsys):
    rows = [
        {"prompt": "2 + 2?", "answer": "4", "solution": ["So \\boxed{4}", "\\boxed{5}", "So \\boxed{4} "]},
        {"prompt": "3 + 3?", "answer": "6", "solution": "\\boxed{6}"},
        {
            "prompt": "2 + 2?",
            "answer": "4",
            "solution": [{"role": "assistant", "content": "It is \\boxed{4}"}],
        },
    ]
    file = tmp_path / "solved.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    (tmp_path / "config.yaml").write_text("sample: {completion_column: solution, prompts_per_record: 1}\n")
    words = ["sample", str(tmp_path / "config.yaml"), f"run_dir={tmp_path / 't'}", f"data.source={file}"]
    assert cohort(words) == 0
    assert [(r["completion"][0]["content"], r["sample"]) for r in rows_of(tmp_path / "t")] == [
        ("So \\boxed{4}", 0)
    ]
    origin = json.loads(rows_of(tmp_path / "t")[0]["provenance"])
    assert origin["model"] is None and rows_of(tmp_path / "t")[0]["pass_rate"] == pytest.approx(2 / 3)
    prompts, generate = read_traces(DataConfig(), rows, "solution")
    assert [p.columns for p in prompts] == [{"answer": "4"}, {"answer": "6"}]
    other = {**rows[0], "answer": "5"}  # of another question in the same words
    assert [p.columns["answer"] for p in read_traces(DataConfig(), [*rows, other], "solution")[0]] == [*"465"]
    first, second = generate(Call(tuple(prompts), 8, SamplingParams(8), (0, 0)))
    assert [c.text for c in first.completions] == [*rows[0]["solution"], "It is \\boxed{4}"]
    assert [c.text for c in second.completions] == ["\\boxed{6}"]


class Server(BaseHTTPRequestHandler):
    """Answers as vLLM does with a reasoning parser; fails on the first request, and always on "never". The
    next two get rubbish.
    """

    rubbish = (b"<html>no</html>", b'HTTP/1.0 200 OK\r\n\r\n{"choices": [null]}')

    seen: ClassVar[list[dict]] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Server.seen.append({**body, "path": self.path, "key": self.headers["Authorization"]})
        if len(Server.seen) == 1 or "never" in body["messages"][0]["content"]:
            self.send_error(503)
            return
        if len(Server.seen) in (2, 3):
            self.wfile.write(self.rubbish[len(Server.seen) - 2])
            self.close_connection = True
            return
        number = body["seed"] % 2 + 4
        message = {"content": f"\\boxed{{{number}}}", "reasoning_content": "I add."}
        reply = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *words):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("COHORT_ENDPOINT_KEY", "sesame")
    monkeypatch.setattr("recipes.tasks.traces.PAUSE_S", 0.01)
    monkeypatch.setattr(Server, "seen", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_a_server_is_asked_with_a_seed_each_and_its_thought_is_kept(endpoint, tmp_path, capsys):
    rows = [{"prompt": "2 + 2?", "answer": "4"}, {"prompt": "never 2 + 2?", "answer": "4"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "config.yaml").write_text(
        f"model: {{name: big-teacher}}\nsample: {{endpoint: '{endpoint}', num_samples: 8}}\n"
        f"sampling: {{stop_token_ids: [7]}}\ndata: {{source: '{tmp_path / 'rows.jsonl'}', "
        "chat_template_kwargs: {enable_thinking: true}}\n"
    )
    words = ["sample", str(tmp_path / "config.yaml")]
    assert cohort([*words, f"run_dir={tmp_path / 't'}"]) == 1
    assert "failed on 8 of 16 requests, more than rewards.max_fault_share=0.05: " in capsys.readouterr().err
    assert Ledger(tmp_path / "t").steps() == []
    Server.seen.clear()
    words.append("rewards.max_fault_share=0.5")
    assert cohort([*words, f"run_dir={tmp_path / 't'}"]) == 0
    (row,) = rows_of(tmp_path / "t")  # the same text each time
    assert row["completion"][0]["content"] == "<think>I add.</think>\\boxed{4}" and row["pass_rate"] == 0.5
    result = json.loads((tmp_path / "t/result.json").read_text())
    assert (result["completions"], result["graded"], result["verified"]) == (16, 8, 4)  # 8 aborted
    asked = [body for body in Server.seen if "never" not in body["messages"][0]["content"]]
    assert {body["path"] for body in asked} == {"/v1/chat/completions"} and len(
        {b["seed"] for b in asked}
    ) == 8
    assert {body["model"] for body in asked} == {"big-teacher"} and asked[0]["key"] == "Bearer sesame"
    assert asked[0]["stop_token_ids"] == [7] and asked[0]["chat_template_kwargs"] == {"enable_thinking": True}
    assert cohort([*words, f"run_dir={tmp_path / 't'}", "model.name=other", "sample.max_per_prompt=1"]) == 1
    assert "model: name (big-teacher then, other now)" in capsys.readouterr().err
    # a server that answers nothing ends the run, and nothing is recorded
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[1]) + "\n")
    assert cohort([*words, f"run_dir={tmp_path / 'n'}"]) == 1
    assert "failed on 8 of 8 requests" in capsys.readouterr().err
    assert Ledger(tmp_path / "n").steps() == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rewards.functions=[]"], "rewards.functions=[] verifies nothing"),
        (["sample.verify={maths: 1}"], "sample.verify names 'maths', which is not a reward"),
        (["sample.bands=[[0.5, null]]"], "must rise from above 0 to 1.0"),
        (["sample.bands=[[0.5, 1], [0.5, 1], [1, 2]]"], "must rise from above 0 to 1.0"),
        (["sampling.temperature=0"], "draws one completion 8 times"),
        (["sample.endpoint=http://x", "sample.completion_column=y"], "use one"),
        (["sample.endpoint=ftp://x"], "sample.endpoint"),
        (["data.continue_final_message=true"], "have no meaning here"),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_a_sentence(traces_config, capsys, words, message):
    assert cohort(["sample", str(traces_config), *words]) == 1
    assert message in capsys.readouterr().err


def test_nothing_verified_is_said_and_not_written(traces_config, tmp_path, capsys):
    words = ["rewards.functions=[{name: think_format}]"]
    assert cohort(["sample", str(traces_config), *words]) == 1
    said = capsys.readouterr().err
    assert "of 96 completions 0 are verified by {'think_format': 1.0} (graded: 96)" in said
    assert not (tmp_path / "traces/traces.parquet").exists()
