"""The recipe as a user meets it: a run on the tiny model, and faults that are refused with a sentence."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.cli import main as cohort
from recipes.evaluation.heldout import check_finished
from recipes.grpo import main
from rl.config.read import load_config
from rl.store.rows import read_rows
from rl.types import Completion, Group, Prompt, Reward, ScoredGroup
from rl.world import World
from tests.report_pages import Page
from tests.rl.families import save_tiny


def test_a_run_leaves_everything_a_user_looks_for(config_file, heldout, capsys):
    assert main([str(config_file), *heldout, "trackers=[tensorboard]"]) == 0
    run = config_file.parent / "run"
    result = json.loads((run / "result.json").read_text())
    assert result.keys() >= {"heldout_before", "heldout_after", "n", "seconds", "steps"}
    assert (result["n"], result["steps"]) == (4, 2)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert (run / "checkpoints" / "step-000002" / "model.safetensors").is_file()
    groups = Page((run / "report.html").read_text()).groups
    assert [(group["kind"], group["step"]) for group in groups if group["kind"] == "e"] == [
        *[("e", 0)] * 4,
        *[("e", 2)] * 4,
    ]
    assert len(groups) == 8 + 2 * 2  # two evaluations of 4 prompts, two steps of 2
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["group_size"] == 4
    out = capsys.readouterr().out
    assert "1 of 8 training prompts are held out" in out
    assert "held-out before:" in out and "step 2/2" in out
    checkpoint, verdict = result["checkpoint"], result["verdict"]
    assert checkpoint == "checkpoints/step-000002"
    assert f"verdict: {verdict}\n" in out and verdict.split(":")[0] in ("Too early", "Warning", "Broken")
    assert cohort(["report", str(run), "--out", str(run / "again.html")]) == 0
    assert (run / "again.html").stat().st_size > 10_000


def test_a_model_of_bytes_trains_to_the_end(config_file, tiny_model_dir, tmp_path, capsys):
    """The byte latent transformer has no cache that transformers could share between completions."""
    folder = save_tiny("blt", tmp_path / "blt")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    with pytest.warns(UserWarning, match=r"sampled without a cache \(slow\)"):
        assert main([str(config_file), f"model.name={folder}", "sampling.max_completion_length=6"]) == 0
    rows = read_rows(config_file.parent / "run" / "metrics.jsonl")
    assert len(rows) == 2 and max(row["sampler/logprob_gap_mean"] for row in rows) < 1e-4
    out = capsys.readouterr().out
    assert "packed attention is off: BltSelfAttention does not pass keyword arguments" in out
    assert "; sequences are trained in padded batches, with the same result" in out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=2"], "did you mean steps?"),
        (["rewards.functions=[{name: math}]", "data.columns=[prompt]"], "needs the column 'answer'"),
        (["rewards.functions=[{name: maht}]"], "math"),
        (["data.source=nowhere.jsonl"], "nowhere.jsonl"),
        (["data.prompt_column=question"], "no column 'question'; it has 'prompt', 'answer'"),
        (["data.max_prompt_length=3"], "raise data.max_prompt_length"),
        (["model.name=/no/such/folder"], "/no/such/folder"),
        (["model.chat_template=/no/such.jinja"], "give a Jinja template's path"),
        (["sampling.max_completion_length=506"], "has 512 positions; lower sampling.max_completion_length"),
        (["model.lora={target_modules: nope}"], "model.lora.target_modules='nope'"),
        (["data.template=Q: {prompt} A:"], "the value is not valid YAML"),
        (
            ["evaluation.data={source: HELD, prompt_column: answer, columns: [prompt, solution]}"],
            "'solution'",
        ),
    ],
)
def test_faults_get_a_sentence_and_exit_code_one(config_file, heldout, capsys, overrides, message):
    held = config_file.parent / "heldout.jsonl"
    overrides = [
        "evaluation.metric=toy_rewards:low_words",
        *(o.replace("HELD", str(held)) for o in overrides),
    ]
    assert main([str(config_file), *overrides]) == 1
    error = capsys.readouterr().err
    assert error.count("cohort:") == 1 and message in error and "Traceback" not in error


def test_a_failing_reward_stops_the_run_and_names_the_fault(config_file, capsys):
    assert main([str(config_file), "rewards.functions=[{name: 'toy_rewards:broken'}]"]) == 1
    error = capsys.readouterr().err
    assert "graders failed on 8 of 8 completions" in error and "no such thing" in error


def test_a_heldout_set_is_graded_or_the_run_does_not_start(config_file, heldout, capsys):
    """What graders fail on counts as wrong, so a failing one would be a false accuracy."""
    broken = "rewards.functions=[{name: 'toy_rewards:broken'}]"
    assert main([str(config_file), *heldout, broken, "evaluation.metric=toy_rewards:broken"]) == 1
    assert "graders failed on 4 of 4 completions" in capsys.readouterr().err
    needs = "rewards.functions=[{name: math}]"
    columns = "evaluation.data.columns=[prompt]"
    assert main([str(config_file), *heldout, needs, columns, "evaluation.metric=math"]) == 1
    assert "reward 'math' needs the column 'answer'; the dataset has: none" in capsys.readouterr().err


def test_a_single_grader_fault_is_counted_and_shown_and_trained_around(config_file, capsys):
    assert main([str(config_file), "rewards.functions=[{name: 'toy_rewards:broken_once'}]"]) == 0
    rows = read_rows(config_file.parent / "run" / "metrics.jsonl")
    assert [row["graders/faults"] for row in rows] == [1 / 8, 0.0]
    out = capsys.readouterr().out
    assert "warning: step 1: graders failed on 1 of 8 completions, which are left out" in out
    assert "only once" in out


def test_a_run_whose_steps_round_to_nothing_says_so(config_file, capsys):
    settings = ["model.dtype=bf16", "optimizer.lr=1e-6", "train.steps=1"]
    assert main([str(config_file), *settings]) == 0
    assert "of the trained values are too coarse in 16 bits for a step of optimizer.lr=1e-06" in (
        capsys.readouterr().out
    )


def test_what_is_broken_is_said_on_the_screen(config_file, capsys):
    overrides = ["rewards.functions=[{name: 'toy_rewards:constant'}]", "train.steps=6"]
    assert main([str(config_file), *overrides, "sampling.max_completion_length=1"]) == 0
    out = capsys.readouterr().out
    assert out.count("warning: completion/truncated_share is 100.0 %") == 1
    assert "raise sampling.max_completion_length" in out
    assert out.count("warning: groups/without_spread is 100.0 %") == 1
    assert (
        out.count("warning: reward part toy_rewards:constant gives all completions of a step the same") == 1
    )


def test_a_log_begins_with_what_is_trained(config_file, heldout, capsys):
    """The adapters of two layers have rank 2 between 32 and 64: 2 * 2 * (32 + 64) = 384 parameters."""
    for lora in (
        [],
        ["model.lora={r: 2, target_modules: [q_proj]}", f"run_dir={config_file.parent / 'lora'}"],
    ):
        assert main([str(config_file), *heldout, "train.steps=1", *lora]) == 0
        first, second = capsys.readouterr().out.splitlines()[:2]
        folder = lora[1].partition("=")[2] if lora else config_file.parent / "run"
        said = re.fullmatch(
            r"(.*): ([\d,]+) of ([\d,]+) parameters trained on 7 rows, engine transformers, cpu, fp32, "
            r"in (.*)",
            first,
        )
        assert said, first
        assert said[1].endswith("model") and said[4] == str(folder)
        assert (said[2] == said[3]) == (not lora)
        assert second == "1 of 8 training prompts are held out too: left out"
    assert said[2] == "384"


def test_the_verdict_is_said_when_it_changes_and_at_the_end(config_file, capsys):
    constant = ["rewards.functions=[{name: 'toy_rewards:constant'}]", "train.steps=6"]
    assert main([str(config_file), *constant]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("verdict: ")]
    assert len(lines) >= 2 and len(set(lines)) < 4
    assert lines[-1].startswith(("verdict: Broken: ", "verdict: Warning: ")) and "since step" in lines[-1]


def test_heldout_accuracy_reaches_the_trackers(config_file, heldout):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main([str(config_file), *heldout, "trackers=[tensorboard]"]) == 0
    (events,) = (config_file.parent / "run" / "tensorboard").glob("events*")
    found = EventAccumulator(str(events)).Reload()
    assert [e.step for e in found.Scalars("heldout/accuracy")] == [0, 2]
    assert [e.step for e in found.Scalars("reward/mean")] == [1, 2]


def test_an_accuracy_stays_a_share_whatever_the_metric_scores(config_file, heldout):
    """Scores of 3 for each and of -1 for each are an accuracy of 1 and of 0."""
    for name, accuracy in (("three", 1.0), ("minus_one", 0.0)):
        run = config_file.parent / name
        rewards = f"rewards.functions=[{{name: 'toy_rewards:{name}'}}]"
        metric = f"evaluation.metric=toy_rewards:{name}"
        assert main([str(config_file), *heldout, rewards, metric, "train.steps=1", f"run_dir={run}"]) == 0
        assert json.loads((run / "result.json").read_text())["heldout_after"] == accuracy


def test_a_heldout_completion_that_is_missing_is_no_wrong_answer():
    late = Completion([], [], [], "abort", [])
    done = Completion([1], [], [True], "stop", [])
    group = ScoredGroup(Group(Prompt("p", "", (1,)), [done, late]), [Reward(1.0), Reward(None)])
    world, config = World(Accelerator(cpu=True)), load_config(None, ["engine.timeout_s=3"])
    with pytest.raises(RuntimeError, match=r"1 of 2 held-out completions within engine.timeout_s=3"):
        check_finished([group], config, world)
    check_finished([ScoredGroup(Group(group.group.prompt, [done]), [Reward(1.0)])], config, world)


def test_training_stop_ids_do_not_end_heldout_completions(config_file, heldout):
    """Every id ends a training completion at once; a held-out one goes on to its own limit."""
    ids = list(range(5, 105))
    lengths = "rewards.functions=[{name: 'toy_rewards:longer_than_one'}]"
    overrides = [lengths, "evaluation.metric=toy_rewards:longer_than_one", f"sampling.stop_token_ids={ids}"]
    assert main([str(config_file), *heldout, *overrides, "train.steps=1"]) == 0
    run = config_file.parent / "run"
    assert [row["completion/length_max"] for row in read_rows(run / "metrics.jsonl")] == [1.0]
    assert json.loads((run / "result.json").read_text())["heldout_before"] > 0


def test_a_finished_run_can_be_extended_and_not_be_changed(config_file, capsys):
    assert main([str(config_file)]) == 0
    assert main([str(config_file), "train.steps=3"]) == 0
    rows = [json.loads(r) for r in (config_file.parent / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert main([str(config_file), "train.steps=3", "optimizer.lr=0.5"]) == 1
    assert "optimizer.lr: 0.001 there, 0.5 now" in capsys.readouterr().err


def test_a_start_that_failed_does_not_hold_the_folder(config_file, heldout, capsys):
    """A corrected config goes on in the same run_dir, and measures its start anew."""
    run = config_file.parent / "run"
    broken = "rewards.functions=[{name: 'toy_rewards:broken'}]"
    assert main([str(config_file), "data.prompt_column=nothing"]) == 1
    assert main([str(config_file), *heldout, "evaluation.metric=toy_rewards:broken", broken]) == 1
    (run / "evaluation.jsonl").write_text('{"step": 0, "accuracy": 0.0, "low": 0.0, "high": 0.5, "n": 4}\n')
    assert main([str(config_file), *heldout]) == 0
    assert json.loads((run / "result.json").read_text())["heldout_before"] > 0
    assert main([str(config_file), *heldout, "data.prompt_column=nothing"]) == 1
    assert "data.prompt_column: 'prompt' there, 'nothing' now" in capsys.readouterr().err


def test_a_run_folder_in_use_is_refused(config_file, capsys):
    from rl.store.durable import run_lock

    with run_lock(config_file.parent / "run"):
        assert main([str(config_file)]) == 1
    assert "run" in capsys.readouterr().err


def test_a_constant_reward_trains_nothing_and_says_so(config_file):
    assert main([str(config_file), "rewards.functions=[{name: 'toy_rewards:constant'}]"]) == 0
    run = config_file.parent / "run"
    rows = [json.loads(r) for r in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["groups/without_spread"] == row["groups/all_right"] == 1.0 for row in rows)
    assert all(row["tokens/trained"] == 0 for row in rows)


def test_two_processes_share_one_run(config_file):
    """Over gloo: every prompt once, one record of each step, and a checkpoint that loads."""
    done = subprocess.run(
        [sys.executable, "-m", "recipes.cli", "train", str(config_file), "--processes=2"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = config_file.parent / "run"
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [1, 2]
    ledgers = sorted((run / "ledger").glob("step-*-rank*.jsonl.gz"))
    assert len(ledgers) == 4  # two steps, two processes
    texts = [gzip.decompress(path.read_bytes()).decode() for path in ledgers]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    prompts = [line["prompt"]["id"] for line in lines if "prompt" in line]
    assert len(set(prompts)) == len(prompts) == 4
    AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step-000002")
