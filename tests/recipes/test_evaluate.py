"""`cohort eval` as a user meets it: a model, a run, a checkpoint, an adapter; graded again; compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from recipes.cli import main as cohort
from recipes.evaluate import TASKS, Ask, settle
from recipes.grpo import main as train
from rl.store.ledger import Ledger
from rl.store.rows import read_rows
from tests.recipes.conftest import write_rows

TOY = ["rewards.functions=[{name: 'toy_rewards:even_words'}]", "evaluation.metric=toy_rewards:even_words"]
SHORT = ["model.dtype=fp32", "engine.name=transformers", "evaluation.sampling.max_completion_length=8"]
FOUR = ["evaluation.num_samples=4", "evaluation.sampling.temperature=1.0"]


def measured(*words: object) -> dict:
    assert cohort(["eval", *map(str, words)]) == 0
    return json.loads((Path(words[words.index("--out") + 1]) / "eval.json").read_text())


@pytest.fixture
def task(config_file) -> list[str]:
    """The words of an evaluation on 9 rows, 4 samples each."""
    rows = write_rows(config_file.parent / "task.jsonl", range(20, 29))
    return ["--task", str(rows), *TOY, *SHORT, *FOUR]


def test_a_model_folder_is_measured_and_what_the_numbers_depend_on_stands_beside(
    tiny_model_dir, task, tmp_path, capsys
):
    found = measured(tiny_model_dir, *task, "--out", tmp_path / "a", "--by", "answer")
    result = found["results"]["toy_rewards:even_words"]
    scores = list(found["scores"]["toy_rewards:even_words"].values())
    assert len(scores) == 9 and all(len(row) == 4 for row in scores)
    assert result["avg"]["value"] == pytest.approx(sum(map(sum, scores)) / 36)
    assert 0 < result["avg"]["value"] < result["pass"]["4"]["value"]  # the toy model answers both ways
    assert result["maj"] == {} and len(result["by"]) == 9  # even_words extracts no answer
    assert found["engine"]["name"] == "transformers" and found["engine"]["version"]
    assert (found["num_samples"], found["seed"], found["sampling"]["temperature"]) == (4, 0, 1.0)
    assert len({found[name] for name in ("digest", "chat_template", "prompts", "rows")}) == 4
    groups = [g for step in Ledger(tmp_path / "a", folder="evaluations").sample(9) for g in step.groups]
    assert len(groups) == 9 and all(c.text for group in groups for c in group.completions)
    out = capsys.readouterr().out
    assert "avg@4" in out and "pass@4" in out and found["digest"][:12] in out and "seed 0" in out
    assert cohort(["report", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "report.html").stat().st_size > 10_000


def test_the_same_seed_gives_the_same_numbers_in_one_process_and_in_two(tiny_model_dir, task, tmp_path):
    """Nine prompts split over two processes as five and four."""
    found = [
        measured(tiny_model_dir, *task, *words, "--out", tmp_path / name)
        for name, words in (("a", []), ("b", []), ("c", ["--processes", "2"]))
    ]
    assert [one["processes"] for one in found] == [1, 1, 2]
    assert len(list((tmp_path / "c" / "evaluations").glob("*.gz"))) == 2
    for name in ("results", "scores", "digest", "prompts", "chat_template", "rows"):
        assert found[0][name] == found[1][name] == found[2][name], name
    again = measured(tiny_model_dir, *task, "--out", tmp_path / "d", "--seed", "1")
    assert again["scores"] != found[0]["scores"]


def test_a_run_is_measured_by_its_own_config_and_as_it_measured_itself(config_file, heldout, tmp_path):
    """Greedy, with the same weights: the numbers of `result.json`, before and after."""
    assert train([str(config_file), *heldout]) == 0
    run = config_file.parent / "run"
    rows = {row["step"]: row for row in read_rows(run / "evaluation.jsonl")}
    base = measured(run, "--base", "--out", tmp_path / "base")
    newest = measured(run, "--out", tmp_path / "newest")
    assert (base["step"], newest["step"]) == (0, 2)
    for found, row in ((base, rows[0]), (newest, rows[2])):
        result = found["results"]["toy_rewards:low_words"]
        assert result["avg"]["value"] == pytest.approx(row["accuracy"], abs=1e-9)
        assert result["truncated"] == row["truncated"] and result["n"] == row["n"] == 4
    assert base["digest"] != newest["digest"] and base["prompts"] == newest["prompts"]
    assert measured(run, "--checkpoint", "2", "--out", tmp_path / "two")["scores"] == newest["scores"]


def test_an_adapter_is_merged_and_its_weights_are_proved(config_file, heldout, tmp_path):
    lora = ["model.lora={r: 4, target_modules: all-linear}", "optimizer.lr=0.05"]
    assert train([str(config_file), *heldout, *lora]) == 0
    run = config_file.parent / "run"
    rows = {row["step"]: row["accuracy"] for row in read_rows(run / "evaluation.jsonl")}
    base, after = (measured(run, *flags, "--out", tmp_path / str(len(flags))) for flags in (["--base"], []))
    found = [one["results"]["toy_rewards:low_words"]["avg"]["value"] for one in (base, after)]
    assert found == pytest.approx([rows[0], rows[2]], abs=1e-9) and base["scores"] != after["scores"]


def test_two_evaluations_are_paired_or_refused_by_name(tiny_model_dir, task, tmp_path, capsys):
    other = tmp_path / "other"
    words = [
        "eval",
        str(tiny_model_dir),
        str(_moved(tiny_model_dir, other)),
        *task,
        "--out",
        str(tmp_path / "x"),
    ]
    assert cohort(words) == 0
    assert "bootstrap over prompts, seed 0" in capsys.readouterr().out
    places = [str(tmp_path / "x" / name) for name in ("0", "1")]
    assert cohort(["eval", "--compare", places[0], places[0] + "/eval.json"]) == 0
    assert "+0.0% (95 % interval +0.0% to +0.0%, p = 1.0000, n = 9" in capsys.readouterr().out
    measured(tiny_model_dir, *task, "--out", tmp_path / "y", "--seed", "5", "evaluation.sampling.top_p=0.9")
    assert cohort(["eval", "--compare", places[0], str(tmp_path / "y")]) == 1
    error = capsys.readouterr().err
    assert "cannot be paired" in error and "seed: 0 and 5" in error and "'top_p': 0.9" in error
    assert cohort(["eval", "--compare", "--force", places[0], str(tmp_path / "y")]) == 0
    assert "not the same: sampling, seed" in capsys.readouterr().out


def _moved(model: Path, to: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    moved = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        moved.lm_head.weight += 0.2 * torch.randn(moved.lm_head.weight.shape, generator=torch.manual_seed(1))
    moved.save_pretrained(to)
    AutoTokenizer.from_pretrained(model).save_pretrained(to)
    return to


def test_two_evaluations_by_another_first_grader_answers_or_engine_are_not_paired(
    tiny_model_dir, task, tmp_path, capsys
):
    """The same completions: one grader passes all, and the other some."""
    names = ["toy_rewards:even_words", "toy_rewards:longer_than_one"]
    for folder, order in (("a", names), ("b", names[::-1])):
        measured(tiny_model_dir, *task, "--out", tmp_path / folder, "--graders", ",".join(order))
    places = [tmp_path / name for name in "ab"]
    assert cohort(["eval", "--compare", *map(str, places)]) == 1
    assert "differ: graders" in capsys.readouterr().err
    found = json.loads((places[0] / "eval.json").read_text())
    found |= {"rows": "of other answers", "engine": found["engine"] | {"dtype": "bfloat16"}}
    found["graders"] = {name: found["graders"][name] for name in names[:1]}  # by one more grader: the same
    (places[1] / "eval.json").write_text(json.dumps(found))
    assert cohort(["eval", "--compare", *map(str, places)]) == 1
    error = capsys.readouterr().err
    assert "differ: rows" in error and "; engine: " in error and "; graders: " not in error


def test_completions_of_another_step_or_of_an_interrupted_evaluation_are_not_graded_again(
    config_file, heldout, tmp_path, monkeypatch, capsys
):
    assert train([str(config_file), *heldout, "optimizer.lr=0.05"]) == 0
    run, out = config_file.parent / "run", tmp_path / "a"
    newest = measured(run, "--out", out)
    (out / "eval.json").unlink()  # as if it had been killed just before
    base = measured(run, "--base", "--out", out)
    assert cohort(["eval", "--regrade", str(out)]) == 0
    again = json.loads((out / "eval.json").read_text())
    assert again["scores"] == base["scores"] != newest["scores"]

    def killed(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("recipes.evaluate.concluded", killed)
    with pytest.raises(KeyboardInterrupt):
        cohort(["eval", str(run), "--base", "--seed", "5", "--out", str(out)])
    assert cohort(["eval", "--regrade", str(out)]) == 1
    assert "is not an evaluation" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--base"]])
def test_a_run_whose_base_has_changed_since_is_refused(config_file, heldout, tiny_model_dir, capsys, flags):
    base = config_file.parent / "base"
    shutil.copytree(tiny_model_dir, base)
    assert train([str(config_file), *heldout, "model.lora={r: 4}", f"model.name={base}"]) == 0
    shutil.copy(_moved(base, base.with_name("moved")) / "model.safetensors", base)
    assert cohort(["eval", str(config_file.parent / "run"), *flags]) == 1
    assert "began (see its inputs.json); restore it" in capsys.readouterr().err


def test_completions_are_graded_again_by_another_grader_and_disagreements_listed(
    tiny_model_dir, task, tmp_path, capsys
):
    before = measured(tiny_model_dir, *task, "--out", tmp_path / "a")
    names = "toy_rewards:even_words,toy_rewards:longer_than_one"
    assert cohort(["eval", "--regrade", str(tmp_path / "a"), "--graders", names]) == 0
    after = json.loads((tmp_path / "a" / "eval.json").read_text())
    first, second = after["scores"].values()
    assert {"toy_rewards:even_words": first} == before["scores"]
    apart = sum(a != b for p in first for a, b in zip(first[p], second[p], strict=True))
    rows = [json.loads(line) for line in (tmp_path / "a" / "disagreements.jsonl").read_text().splitlines()]
    assert len(rows) == after["disagreements"] == apart > 0
    assert all(len(set(row["scores"].values())) == 2 and row["text"] for row in rows)
    assert f"graders disagree on {apart} completions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL"], "nothing to measure it on; use --task FILE, or one of gsm8k"),
        (["MODEL", "--task", "nowhere.jsonl"], "there is no such file"),
        (
            ["MODEL", "--task", "TASK", "train.steps=3"],
            "train.steps=3: an evaluation takes keys of evaluation.",
        ),
        (["MODEL", "--task", "TASK", "--base"], "need a run's folder"),
        (["MODEL", "--task", "TASK", "--base", "--checkpoint", "2"], "give one of them"),
        (
            ["MODEL", "--task", "TASK", "--by", "prompt"],
            "--by prompt: the dataset has no such column for graders (data.columns); it has answer",
        ),
        (
            ["MODEL", "--task", "TASK", "evaluation.num_samples=4"],
            "temperature=0 draws one completion 4 times",
        ),
        (
            ["MODEL", "--task", "TASK", "--by", "level"],
            "--by level: the dataset has no such column; it has answer",
        ),
        (["MODEL", "--task", "TASK", "--out", "RUN"], "is the folder of a run; name another"),
        (["--compare", "MODEL"], "two folders to --compare"),
        (["--compare", "MODEL", "TASK"], "is not an evaluation that cohort eval wrote"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    tiny_model_dir, config_file, capsys, words, message
):
    rows = write_rows(config_file.parent / "task.jsonl", range(3))
    places = {"MODEL": str(tiny_model_dir), "TASK": str(rows), "RUN": str(config_file.parent)}
    assert cohort(["eval", *(places.get(word, word) for word in words)]) == 1
    error = capsys.readouterr().err
    assert error.count("cohort:") == 1 and message in error and "Traceback" not in error


def test_a_folder_with_another_evaluation_is_not_written_over(tiny_model_dir, task, tmp_path, capsys):
    measured(tiny_model_dir, *task, "--out", tmp_path / "a")
    other = _moved(tiny_model_dir, tmp_path / "other")
    assert cohort(["eval", str(other), *task, "--out", str(tmp_path / "a")]) == 1
    assert "holds an evaluation with another model" in capsys.readouterr().err


def test_a_task_is_read_by_its_columns(tmp_path):
    """GSM8K's form, a problem with LaTeX, numbers under another name, and a generator."""
    rows = {
        "gsm8k": {"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
        "latex": {"problem": "x?", "answer": "\\frac{\\pi}{2}", "difficulty": 2.5},
        "named": {"prompt": "2 + 2?", "gold": "4"},
    }
    expected = {"gsm8k": ("question", {}), "latex": ("problem", {}), "named": ("prompt", {"gold": "answer"})}
    for name, row in rows.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        config, step = settle(Ask("some/model", task=str(tmp_path / f"{name}.jsonl")))
        data = config.evaluation.data
        assert data is not None and (data.prompt_column, data.rename) == expected[name]
        assert "\\boxed{}" in data.template and config.evaluation.metric == "math" and step == 0
        assert config.evaluation.sampling.temperature == 0.0
    config, _ = settle(Ask("some/model", task="reasoning_gym:chain_sum"))
    assert [spec.name for spec in config.rewards.functions] == ["reasoning_gym"]
    for name in TASKS:
        config, _ = settle(
            Ask("some/model", task=name, overrides=["evaluation.sampling.max_completion_length=9"])
        )
        assert config.evaluation.data is not None and config.evaluation.sampling.max_completion_length == 9
        assert config.evaluation.sampling.temperature == 0.0 and config.model.name == "some/model"


def test_a_run_that_holds_out_a_share_is_measured_on_the_rows_that_it_held_out(config_file, tmp_path):
    held = ["evaluation.data={share: 0.3}", "evaluation.metric=toy_rewards:low_words", "train.steps=1"]
    assert train([str(config_file), *held, "train.seed=3"]) == 0
    run = config_file.parent / "run"
    found = measured(run, "--seed", "9", "--out", tmp_path / "a")
    trained = {g.prompt.text for step in Ledger(run).sample(9) for g in step.groups}
    asked = {
        g.prompt.text for step in Ledger(tmp_path / "a", folder="evaluations").sample(9) for g in step.groups
    }
    assert len(asked) == 2 and not asked & trained and found["seed"] == 9
    inside = {g.prompt.text for step in Ledger(run, folder="evaluations").sample(9) for g in step.groups}
    assert asked == inside
