"""A miniature of the R1 pipeline: killed in every stage it ends as an undisturbed one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet
import pytest
import yaml
from safetensors.torch import load_file

from recipes.pipeline import main
from tests.recipes.conftest import TOYS, write_rows

ROOT = Path(__file__).parents[2]
STOPS = ["+", "-", "=", ".", "?", "What", "is", "the"]


def stages(model: str) -> list[dict]:
    """Cold start, GRPO, rejection sampling, SFT, second GRPO, distillation to a fresh student, evaluation."""
    small = {"name": model, "dtype": "fp32"}
    sft = {
        "train": {"steps": 6, "examples_per_step": 2, "micro_batch": 2},
        "data": {"source": "rows.jsonl", "max_length": 64},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 1, "keep": 2},
    }
    rewards = [
        {"name": "toy_rewards:even_words"},
        {"name": "think_format", "weight": 0.1},
        {"name": "language_consistency", "weight": 0.1},
    ]
    grpo = {
        "data": {"source": "train.jsonl", "max_prompt_length": 32},
        "sampling": {"max_completion_length": 12},
        "engine": {"name": "transformers"},
        "rewards": {"functions": rewards},
        "train": {"steps": 4, "prompts_per_step": 2, "group_size": 4, "token_budget": 256},
        "loss": {"kl_coef": 0.0},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every": 1},
    }
    traces = {
        "data": {"source": "train.jsonl"},
        "sampling": {"max_completion_length": 24, "stop": STOPS},
        "engine": {"name": "transformers"},
        "rewards": {"functions": rewards[:1]},
        "sample": {"num_samples": 8, "prompts_per_record": 1},
    }
    at = lambda name: {"model": {**small, "name": name}}  # noqa: E731
    made = {**sft, "data": {"source": "${traces}", "max_length": 64}}
    evaluation = ["${distil}", "--task=heldout.jsonl", "--graders=math", "engine.name=transformers"]
    evaluation += ["evaluation.sampling.max_completion_length=8"]
    return [
        {"name": "cold_start", "recipe": "sft", "config": sft | at(model)},
        {"name": "grpo", "recipe": "grpo", "config": grpo | at("${cold_start}")},
        {"name": "traces", "recipe": "rejection", "config": traces | at("${grpo}")},
        {"name": "sft", "recipe": "sft", "config": made | at("${cold_start}")},
        {"name": "second_grpo", "recipe": "grpo", "config": grpo | at("${sft}")},
        {"name": "distil", "recipe": "sft", "config": made | at(model)},
        {"name": "measured", "recipe": "eval", "arguments": evaluation},
    ]


def folder_for(folder: Path, model: Path, steps: list[dict]) -> Path:
    folder.mkdir()
    write_rows(folder / "train.jsonl", range(12))
    write_rows(folder / "heldout.jsonl", range(40, 44))
    rows = [f'{{"prompt": "What is w{i} ?", "completion": "w{2 * i} w{i} ."}}\n' for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(rows))
    (folder / "pipeline.yaml").write_text(yaml.safe_dump({"run_dir": "pipe", "stages": steps}))
    return folder


def start(folder: Path) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TOYS), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("a") as log:
        command = [sys.executable, "-m", "recipes.pipeline", "pipeline.yaml"]
        return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)


STRUCK = {  # stage -> what is there in its middle, and what is there at its end
    "cold_start": ("checkpoints/checkpoint-2", "result.json"),
    "grpo": ("ledger/step-000001-rank0.jsonl.gz", "result.json"),
    "traces": ("ledger/step-000004-rank0.jsonl.gz", "traces.parquet"),
    "sft": ("checkpoints/checkpoint-2", "result.json"),
    "second_grpo": ("checkpoints/step-000002", "result.json"),
    "distil": ("checkpoints/checkpoint-4", "result.json"),
    "measured": ("engine.log", "eval.json"),
}


def kill_in(stage: str, child: subprocess.Popen, folder: Path) -> None:
    """SIGKILL to the pipeline and all below it as soon as the stage is in its middle."""
    middle, end = (folder / "pipe" / stage / name for name in STRUCK[stage])
    deadline = time.monotonic() + 300
    while not middle.exists():
        assert child.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
        time.sleep(0.001)
    doomed = [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]
    for process in doomed:
        process.suspend()
    assert not end.exists(), f"{stage} was over before it could be killed"
    for process in doomed:
        process.send_signal(signal.SIGKILL)
    assert child.wait(timeout=30) == -signal.SIGKILL
    psutil.wait_procs(doomed[1:], timeout=30)


@pytest.mark.rotation
@pytest.mark.timeout(900)
def test_killed_in_every_stage_a_pipeline_neither_repeats_nor_loses_a_trace(tiny_model_dir, tmp_path):
    steps = stages(str(tiny_model_dir))
    cut = folder_for(tmp_path / "c", tiny_model_dir, steps)
    whole = folder_for(tmp_path / "w", tiny_model_dir, steps[:5])  # what is compared below
    undisturbed = start(whole)  # meanwhile
    for stage in STRUCK:
        kill_in(stage, start(cut), cut)
    assert start(cut).wait(timeout=300) == 0, (cut / "log").read_text()[-3000:]
    assert undisturbed.wait(timeout=300) == 0, (whole / "log").read_text()[-3000:]
    files = [folder / "pipe/traces/traces.parquet" for folder in (whole, cut)]
    assert files[0].read_bytes() == files[1].read_bytes()
    rows = pyarrow.parquet.read_table(files[1]).to_pylist()
    assert len(rows) >= 5 and set(Counter((r["prompt_id"], r["sample"]) for r in rows).values()) == {1}
    for name in ("grpo/checkpoints/step-000004", "second_grpo/checkpoints/step-000004"):
        a, b = (load_file(folder / "pipe" / name / "model.safetensors") for folder in (whole, cut))
        assert all((a[key] == b[key]).all() for key in a)


def refused(tmp_path: Path, steps: list[dict], *words: str) -> str:
    """What a pipeline says that ends before its first stage begins."""
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"run_dir": str(tmp_path / "pipe"), "stages": steps}))
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert main([str(tmp_path / "p.yaml"), *words]) == 1
    assert not list((tmp_path / "pipe").glob("*/"))
    return said.getvalue()


def changed(number: int, key: str, value: object) -> Callable[[list[dict]], None]:
    """Sets a dotted key of a stage."""

    def change(steps: list[dict]) -> None:
        *parents, leaf = key.split(".")
        tree = steps[number]
        for parent in parents:
            tree[parent] = dict(tree[parent])
            tree = tree[parent]
        tree[leaf] = value

    return change


FAULTS = [
    (changed(6, "recipe", "measure"), "stage measured: no recipe 'measure'; there are grpo, llada, sft"),
    (
        changed(4, "config.model.name", "${stf}"),
        "stage second_grpo: ${stf} names no earlier stage; there are: cold",
    ),
    (changed(1, "config.model.name", "${traces}"), "stage grpo: ${traces} names no earlier stage"),
    (
        changed(5, "config.train.stepz", 3),
        "stage distil: 1 fault in the config:",
    ),
    (
        changed(4, "config.data.source", "gone.jsonl"),
        "stage second_grpo: data.source='gone.jsonl': there is no such",
    ),
    (changed(2, "config.run_dir", "x"), "stage traces: its run_dir is"),
    (changed(3, "name", "grpo"), "two stages are named 'grpo'"),
    (changed(3, "arguments", ["x"]), "stage sft: sft takes no arguments; use config"),
    (changed(6, "config", {"x": 1}), "stage measured: eval takes no config; use arguments"),
    (changed(6, "arguments", ["${distil}", "train.steps=3"]), "train.steps=3: an evaluation takes keys of"),
    (
        changed(2, "config.rewards", {"functions": [{"name": "mth"}]}),
        "rewards.functions.0.name='mth': no such reward",
    ),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=lambda v: v[:40] if isinstance(v, str) else "")
def test_a_fault_of_any_stage_is_said_before_the_first_one_starts(
    tiny_model_dir, tmp_path, monkeypatch, change, message
):
    folder = folder_for(tmp_path / "f", tiny_model_dir, steps := stages(str(tiny_model_dir)))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TOYS), str(ROOT)]))
    monkeypatch.syspath_prepend(TOYS)
    change(steps)
    assert message in refused(folder, steps)


def two_of_a_file(folder: Path, **first) -> list[dict]:
    """Traces of a file under a slow grader, and of those the ones that another grader verifies."""
    slow = {"functions": [{"name": "toy_rewards:slow"}]}
    sample = {"completion_column": "texts", "prompts_per_record": 1, "verify": {"toy_rewards:slow": 0.5}}
    again = {"completion_column": "completion", "max_per_prompt": None}
    longer = {"functions": [{"name": "toy_rewards:constant"}]}
    return [
        {
            "name": "a",
            "recipe": "rejection",
            "config": {"data": {"source": "texts.jsonl"}, "rewards": slow, "sample": sample | first},
        },
        {
            "name": "b",
            "recipe": "rejection",
            "config": {
                "data": {"source": "${a}", "columns": ["prompt_id"]},
                "rewards": longer,
                "sample": again,
            },
        },
    ]


def write_pipeline(folder: Path, steps: list[dict]) -> None:
    (folder / "pipeline.yaml").write_text(yaml.safe_dump({"run_dir": "pipe", "stages": steps}))


def until(there: Path, child: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not there.exists():
        assert child.poll() is None and time.monotonic() < deadline, "ended before that"
        time.sleep(0.005)


@pytest.mark.rotation
def test_signals_reach_the_stage_and_changes_of_what_is_finished_are_refused(
    tiny_model_dir, tmp_path, monkeypatch, capfd
):
    folder = folder_for(tmp_path / "f", tiny_model_dir, two_of_a_file(tmp_path))
    # 30 prompts, each with a right, a wrong and another right text
    rows = [{"prompt": f"p{i}", "texts": [f"w1 w2 w{i}", "w70 w71", f"w{i} w3"]} for i in range(30)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ledger = folder / "pipe/a/ledger"
    until(ledger / "step-000003-rank0.jsonl.gz", child := start(folder))
    child.terminate()
    assert child.wait(timeout=60) == 128 + signal.SIGTERM
    said, num = (folder / "log").read_text(), len(list(ledger.iterdir()))
    assert "stopped; the same command goes on" in said and "stage a ended with exit code 143" in said
    assert 4 <= num < 30 and not (folder / "pipe/a/traces.parquet").exists()
    until(ledger / f"step-{num + 3:06d}-rank0.jsonl.gz", child := start(folder))
    (stage,) = [p for p in psutil.Process(child.pid).children() if "recipes.rejection" in p.cmdline()]
    stage.kill()
    assert child.wait(timeout=60) == 128 + signal.SIGKILL
    assert start(folder).wait(timeout=120) == 0, (folder / "log").read_text()[-2000:]
    kept = pyarrow.parquet.read_table(folder / "pipe/b/traces.parquet").to_pylist()
    texts = [row["completion"][0]["content"] for row in kept]
    assert sorted(texts) == sorted(t for row in rows for t in (row["texts"][0], row["texts"][2]))

    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(TOYS)
    assert main(["pipeline.yaml"]) == 0
    assert capfd.readouterr().out.count("already finished") == 2
    write_pipeline(folder, two_of_a_file(folder, max_per_prompt=1))
    assert main(["pipeline.yaml"]) == 1
    message = "stage a is finished with other settings:\n      sample.max_per_prompt: 4 there, 1 now"
    assert message in capfd.readouterr().err
    write_pipeline(folder, two_of_a_file(folder))
    shutil.move("pipe/a", "aside")
    assert main(["pipeline.yaml"]) == 1
    assert "stage a is not finished, but b has begun with its result" in capfd.readouterr().err


@pytest.mark.rotation
@pytest.mark.parametrize("recipe", ["rejection", "prune"])
def test_a_stage_ends_with_a_pipeline_that_is_killed_during_its_imports(tiny_model_dir, tmp_path, recipe):
    prune = [{"name": "a", "recipe": "prune", "arguments": [str(tiny_model_dir), "${here}"]}]
    folder = folder_for(
        tmp_path / "f", tiny_model_dir, prune if recipe == "prune" else two_of_a_file(tmp_path)[:1]
    )
    rows = [{"prompt": f"p{i}", "texts": ["w1 w2"]} for i in range(30)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    until(folder / "pipe/a.yaml", child := start(folder))
    while not (
        found := [p for p in psutil.Process(child.pid).children() if f"recipes.{recipe}" in p.cmdline()]
    ):
        time.sleep(0.001)
    child.kill()
    psutil.wait_procs(found, timeout=60)
    assert not (folder / "pipe/a").exists() and not found[0].is_running()


@pytest.mark.rotation
def test_a_student_is_pruned_from_a_stage_whose_name_begins_like_its_own(tiny_model_dir, tmp_path):
    steps = [
        {"name": "cut_first", "recipe": "prune", "arguments": [str(tiny_model_dir), "${here}"]},
        {"name": "cut", "recipe": "prune", "arguments": ["${cut_first}", "${here}", "--ffn=8"]},
    ]
    folder = folder_for(tmp_path / "f", tiny_model_dir, steps)
    assert start(folder).wait(timeout=120) == 0, (folder / "log").read_text()
    config = json.loads((folder / "pipe/cut/config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (2, 8)


@pytest.mark.rotation
def test_what_a_program_makes_is_there_whole_or_not_at_all(tiny_model_dir, tmp_path, monkeypatch, capfd):
    words = [str(tiny_model_dir), "${here}", "--experts=2", "--top-k=1"]
    steps = [{"name": "moe", "recipe": "upcycle", "arguments": words}]
    folder = folder_for(tmp_path / "f", tiny_model_dir, steps)
    half = folder / "pipe/.making-moe"  # what a kill left
    half.mkdir(parents=True)
    assert start(folder).wait(timeout=120) == 0, (folder / "log").read_text()
    config = json.loads((folder / "pipe/moe/config.json").read_text())
    assert config["num_local_experts"] == 2 and not half.exists()
    monkeypatch.chdir(folder)
    assert main(["pipeline.yaml"]) == 0
    assert "already finished: pipe/moe" in capfd.readouterr().out
    write_pipeline(folder, [{**steps[0], "arguments": [*words[:3], "--top-k=2"]}])
    assert main(["pipeline.yaml"]) == 1
    assert "stage moe is finished with other settings" in capfd.readouterr().err
    write_pipeline(folder, [{**steps[0], "arguments": [*words, "--expertz=2"]}])
    with pytest.raises(SystemExit):
        main(["pipeline.yaml"])
    assert "--expertz" in capfd.readouterr().err
