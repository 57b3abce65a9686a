"""Rows come from the split that was asked for, under the names that were asked for, or the run is refused."""

from __future__ import annotations

import json
import re
import sys
import time
from contextlib import closing

import datasets
import pytest

from recipes.grpo import main
from recipes.llada import main as fine_tune
from recipes.tasks import load_rows
from recipes.tasks.prompts import check_braces, check_rewards, split_share
from rewards.compose import RewardSpec
from rewards.pool.pool import RewardPool
from rl.config import DataConfig
from rl.config.diffusion import DiffusionConfig
from rl.config.read import load_config, read_config
from rl.store.ledger import Ledger

ROWS = [{"prompt": f"w{i}", "solution": str(i)} for i in range(10)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def prompts(**keys) -> list[str]:
    return [row["prompt"] for row in load_rows(DataConfig(**keys))]


def saved(tmp_path, *names: str) -> str:
    sets = {n: datasets.Dataset.from_list([{"prompt": f"{n}{i}"} for i in range(4)]) for n in names}
    whole = datasets.DatasetDict(sets) if names != ("alone",) else sets["alone"]
    whole.save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def test_a_file_has_one_split_and_its_slices(file):
    assert prompts(source=str(file), split="train[:20%]") == ["w0", "w1"]
    with pytest.raises(ValueError, match=r"data\.split='nonsense' is not in .*it has \['train'\].*\[:90%\]"):
        prompts(source=str(file), split="nonsense")


def test_a_folder_has_the_splits_that_its_files_are_named_for(file):
    folder = file.parent / "folder"
    folder.mkdir()
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text(json.dumps({"prompt": name}) + "\n")
    assert prompts(source=str(folder), split="test") == ["test"]
    with pytest.raises(ValueError, match=r"data\.split='nonsense' is not in .*it has \['train', 'test'\]"):
        prompts(source=str(folder), split="nonsense")


def test_a_saved_data_set_has_its_own_splits_and_their_slices(tmp_path):
    source = saved(tmp_path, "train", "extra")
    assert prompts(source=source, split="extra[1:3]") == ["extra1", "extra2"]
    assert prompts(source=source, split="train+extra[:1]") == [
        "train0",
        "train1",
        "train2",
        "train3",
        "extra0",
    ]
    with pytest.raises(ValueError, match=r"data\.split='test' is not in .*it has \['train', 'extra'\]"):
        prompts(source=source, split="test")


def test_a_saved_data_set_without_splits_is_train(tmp_path):
    source = saved(tmp_path, "alone")
    assert prompts(source=source, split="train[3:]") == ["alone3"]
    with pytest.raises(ValueError, match=r"data\.split='nonsense'"):
        prompts(source=source, split="nonsense")
    with pytest.raises(ValueError, match=r"data\.options=\{name: main\} does nothing"):
        prompts(source=source, options={"name": "main"})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.options={answer: solution}"],
            "data.options={answer: solution} does nothing, as data.source=",
        ),
        (["data.options={answer: solution}"], "columns are renamed by data.rename={old: new}"),
        (["data.revision=main"], "is not on the hub"),
        (["data.source=reasoning_gym:chain_sum", "data.split=test"], "has no splits"),
        (["data.source=my_rows:make", "data.split=test"], "has no splits"),
        (["data.rename={a: x, b: x}"], "gives two columns one name"),
        (["data.template=Answer at once."], "has no {prompt}"),
        (["data.chat_template_kwargs={tools: []}"], "data.chat_template_kwargs has tools, which is not"),
        (["evaluation.data={source: rows.jsonl, options: {a: b}}"], "evaluation.data.options={a: b} does"),
        (["evaluation.data={source: rows.jsonl, share: 0.1}"], "leave out evaluation.data.source"),
        (["evaluation.data={share: 1.0}"], "less than 1"),
    ],
)
def test_a_key_that_would_do_nothing_is_refused_with_the_config(config_file, overrides, message):
    with pytest.raises(ValueError) as caught:
        load_config(config_file, ["evaluation.metric=toy_rewards:low_words", *overrides])
    assert message in str(caught.value)


def test_fine_tuning_refuses_options_of_a_file_with_the_config(tmp_path):
    (tmp_path / "c.yaml").write_text("data: {source: rows.jsonl, options: {answer: solution}}")
    with pytest.raises(ValueError, match=r"data\.options=\{answer: solution\} does nothing"):
        read_config(DiffusionConfig, tmp_path / "c.yaml")


def test_columns_are_renamed_from_old_to_new(file):
    rows = load_rows(DataConfig(source=str(file), rename={"solution": "answer"}, size=2))
    assert rows == [{"prompt": "w0", "answer": "0"}, {"prompt": "w1", "answer": "1"}]
    swapped = load_rows(
        DataConfig(source=str(file), size=1, rename={"prompt": "solution", "solution": "prompt"})
    )
    assert swapped == [{"solution": "w0", "prompt": "0"}]


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        ({"soluton": "answer"}, "no column 'soluton'; it has 'prompt', 'solution'; did you mean 'solution'?"),
        ({"solution": "prompt"}, "has a column 'prompt' already; rename that one as well"),
    ],
)
def test_a_rename_that_fits_no_column_or_hides_one_is_refused(file, rename, message):
    with pytest.raises(ValueError) as caught:
        load_rows(DataConfig(source=str(file), rename=rename))
    assert message in str(caught.value)


def test_a_run_grades_by_a_renamed_column(config_file, file):
    keys = [f"data.source={file}", "data.rename={solution: answer}", "rewards.functions=[{name: math}]"]
    assert main([str(config_file), *keys, "train.steps=1"]) == 0


@pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "/no/such/folder", "a/b/c", "here/nowhere"])
def test_a_missing_file_ends_at_once_with_a_sentence(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"there is no such file or folder"):
        load_rows(DataConfig(source=name))
    assert time.monotonic() - began < 14  # the hub's retries take 28 s


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "b", "answer": }', r"line 3: not JSON \(Expecting value, column 27\)"),
        (b'{"prompt": "b", "ans', r"line 3: not JSON \(Unterminated string starting at, column 17\)"),
        (b'["b"]', r"line 3: a row is an object such as .* not \['b'\]"),
        (b'{"prompt": "caf\xe9"}', r"line 3: not UTF-8 \(invalid continuation byte at byte 15\); save it"),
    ],
)
def test_a_broken_line_is_named_by_its_number(file, line, message):
    first, second, *rest = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([first, second, line, *rest]))
    with pytest.raises(ValueError, match=rf"data\.source='.*rows\.jsonl', {message}"):
        load_rows(DataConfig(source=str(file)))


def test_an_address_is_refused_as_one():
    with pytest.raises(ValueError, match=r"'https://host/a\.jsonl' is an address; download the file"):
        load_rows(DataConfig(source="https://host/a.jsonl"))


def test_a_missing_file_names_the_nearest(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    with pytest.raises(ValueError, match=r"did you mean 'rows\.jsonl'\?"):
        load_rows(DataConfig(source="row.jsonl"))


@pytest.mark.parametrize("beside_config", [False, True])
def test_a_callable_is_found_in_the_working_directory_and_beside_the_config(
    config_file, tmp_path, monkeypatch, beside_config
):
    """As rewards are: an installed command has neither on its path."""
    here = tmp_path / "here"
    here.mkdir()
    name = f"rows_beside_{beside_config}".lower()
    code = "def make(num=2): return [{'prompt': f'w{i}'} for i in range(num)]"
    (config_file.parent if beside_config else here).joinpath(f"{name}.py").write_text(code)
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    keys = [f"data.source={name}:make", "data.options={num: 3}", "train.steps=1"]
    assert main([str(config_file), *keys]) == 0


def test_a_module_that_raises_is_refused_with_its_error(tmp_path, monkeypatch):
    (tmp_path / "broken_rows.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"broken_rows\.py, line 1: ZeroDivisionError: division"):
        load_rows(DataConfig(source="broken_rows:make"))


def test_rows_without_what_a_reward_needs_are_counted_before_they_are_sampled(file):
    said: list[str] = []
    data = DataConfig(source=str(file), rename={"solution": "answer"})
    with closing(RewardPool([RewardSpec("math"), RewardSpec("boxed_format")])) as pool:
        check_rewards(pool, data, rows := load_rows(data), said.append)
        assert said == []
        gaps = [rows[0] | {"answer": ""}, rows[1] | {"answer": None}, *rows[2:]]
        check_rewards(pool, data, gaps, said.append)
    assert len(said) == 1
    assert "2 of 10 rows of" in said[0] and "have no 'answer', which reward 'math' needs" in said[0]


def compares_text(completions, answer, **columns):
    return [float(c == str(a)) for c, a in zip(completions, answer, strict=True)]


def test_whole_numbers_that_the_hub_may_have_made_floats_are_named(file):
    said: list[str] = []
    rows = [{"prompt": "a", "answer": 2.5}, {"prompt": "b", "answer": 7.0}]
    names = ["math", "math_verify", f"{__name__}:compares_text"]
    with closing(RewardPool([RewardSpec(name) for name in names])) as pool:
        check_rewards(pool, DataConfig(source=str(file)), rows, said.append)
        check_rewards(pool, DataConfig(source="some/set"), rows[:1], said.append)
        assert said == []
        check_rewards(pool, DataConfig(source="some/set"), rows, said.append)
    assert len(said) == 1 and "column 'answer' of some/set holds floats such as 7.0, perhaps" in said[0]
    assert "the text 7 is not 7.0; let reward" in said[0]


@pytest.mark.parametrize(
    ("template", "warned"),
    [
        ("{context}\n{prompt}\n{answer}", "has {context}, {answer}, which the model sees as it stands"),
        ("Context:{context} {prompt}", "has {context}, which"),
        ("{prompt}{context}", "has {context}, which"),
        ("\\boxed{} {context}{prompt}", "has {context}, which"),
        ("{prompt} \\sqrt[3]{answer} x_{context}^{answer}", None),
        ("{{prompt}}", "sees doubled: write single braces"),
        ("{prompt} \\boxed{{}}", "sees doubled: write single braces"),
        ("{prompt} \\boxed{answer}, not \\frac{answer}{context}", None),
        ('{prompt} as {"answer": {"value": 1}}', None),
        ("{prompt} {a} \\boxed{}", None),
        ("{prompt} \\{answer\\}", None),
    ],
)
def test_a_template_that_leaves_a_column_out_is_named(template, warned):
    said: list[str] = []
    check_braces(template, [{"context": "c", "prompt": "p", "answer": "1"}], said.append)
    assert len(said) == (warned is not None) and (not warned or warned in said[0])


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["evaluation.data={share: 0.5}", "evaluation.metric=toy_rewards:low_words"], ["data"]),
        (["evaluation.data.template='{answer} {prompt}'"], ["data", "evaluation.data"]),
    ],
)
def test_each_template_is_named_once_by_its_own_key(config_file, heldout, words, keys, capsys):
    held = [] if "share" in words[0] else heldout
    assert main([str(config_file), "data.template='{prompt}{answer}'", *held, *words, "train.steps=1"]) == 0
    said = capsys.readouterr()
    found = re.findall(r"(\S+)\.template has ", said.out + said.err)
    assert found == keys


def test_a_template_of_a_teacher_may_hold_the_demonstration():
    said: list[str] = []
    rows, shown = [{"prompt": "p", "demonstration": "d", "hint": "h"}], ("demonstration", "prompt")
    for template in ("{prompt} {demonstration}", "{prompt} {demonstration} {hint}"):
        check_braces(template, rows, said.append, key="teacher.template", replaced=shown)
    assert len(said) == 1 and said[0].startswith("teacher.template has {hint}, which the model sees as it")
    assert "it replaces {demonstration} and {prompt}, nothing else" in said[0]


def test_a_held_out_share_is_apart_from_training_and_the_same_in_any_order():
    rows = [{"prompt": f"w{i % 50}", "answer": i} for i in range(100)]  # 50 prompts, twice each
    kept, heldout = split_share(rows, 0.2, seed=0, prompt_column="prompt")
    assert (len(kept), len(heldout)) == (80, 20)  # 10 of 50 prompts
    assert not {r["prompt"] for r in kept} & {r["prompt"] for r in heldout}
    again = split_share(rows[::-1], 0.2, seed=0, prompt_column="prompt")[1]
    assert {r["prompt"] for r in again} == {r["prompt"] for r in heldout}
    assert split_share(rows, 0.2, seed=1, prompt_column="prompt")[1] != heldout


def test_a_share_holds_out_one_prompt_at_least_and_never_all():
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    for share in (0.001, 0.999):
        assert [len(side) for side in split_share(rows, share, seed=0, prompt_column="prompt")] == [1, 1]
    with pytest.raises(ValueError, match=r"data\.source has 1; give evaluation\.data a source"):
        split_share(rows[:1], 0.5, seed=0, prompt_column="prompt")


def test_a_share_of_rows_without_the_prompt_column_names_the_column(config_file, capsys):
    keys = ["evaluation.data={share: 0.25}", "evaluation.metric=toy_rewards:low_words"]
    assert main([str(config_file), *keys, "data.prompt_column=question"]) == 1
    assert "no column 'question'; it has 'prompt', 'answer'" in capsys.readouterr().err


def test_a_run_evaluates_on_its_held_out_share(config_file, capsys):
    keys = ["evaluation.data={share: 0.25}", "evaluation.metric=toy_rewards:low_words"]
    assert main([str(config_file), *keys, "data.max_prompt_length=32"]) == 0
    result = json.loads((config_file.parent / "run" / "result.json").read_text())
    assert result["n"] == 2
    assert (
        "share=0.25: 2 of the 8 rows of data.source are held out, 6 are trained on" in capsys.readouterr().out
    )
    assert main([str(config_file), *keys, "train.steps=3"]) == 0  # the resolved config is read again


def test_a_run_refuses_a_template_that_takes_too_much(config_file, tmp_path, capsys):
    file = tmp_path / "bomb.jinja"
    file.write_text("{{ 'x' * 10**11 }}")
    assert main([str(config_file), f"model.chat_template={file}"]) == 1
    error = capsys.readouterr().err
    assert f"train row 0: the chat template, read from {file}, takes too much: MemoryError" in error


def test_a_run_gives_the_template_its_variables_and_drops_long_rows(config_file, tmp_path, capsys):
    file = tmp_path / "thinking.jinja"
    file.write_text("{% if enable_thinking %}w7 {% endif %}{{ messages[0].content }}")
    with (tmp_path / "train.jsonl").open("a") as rows:
        rows.write(json.dumps({"prompt": "w1 " * 40, "answer": "w1"}) + "\n")
    keys = [f"model.chat_template={file}", "data.chat_template_kwargs={enable_thinking: true}"]
    assert main([str(config_file), *keys]) == 1
    assert "1 of 9 rows of train have more than data.max_prompt_length=32" in capsys.readouterr().err
    assert main([str(config_file), *keys, "data.too_long=drop", "train.steps=1"]) == 0
    assert "row 8 (41); they are left out" in capsys.readouterr().out
    (group, *_) = Ledger(config_file.parent / "run").read(0).groups
    assert group.prompt.text.startswith("w7 What is")


def test_fine_tuning_refuses_a_template_that_takes_too_much(tiny_model_dir, tmp_path, capsys):
    (tmp_path / "bomb.jinja").write_text("{{ 'x' * 10**11 }}")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "w1", "completion": "w2"}) + "\n")
    config = {
        "run_dir": str(tmp_path / "run"),
        "model": {"name": str(tiny_model_dir), "dtype": "fp32", "mask_token": "<unk>"},
        "data": {"source": str(tmp_path / "rows.jsonl")},
    }
    config["model"]["chat_template"] = str(tmp_path / "bomb.jinja")
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    assert fine_tune([str(tmp_path / "config.yaml")]) == 1
    assert "bomb.jinja, takes too much: MemoryError" in capsys.readouterr().err
