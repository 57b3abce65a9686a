"""A checkpoint's own code is never run, whatever is answered on a terminal, and LLaDA's folders need none."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path

import pytest
from accelerate import Accelerator
from transformers import Qwen2Tokenizer

from recipes.cli import main as cohort
from recipes.evaluate_llada import main as evaluate
from recipes.grpo import main as grpo
from recipes.llada import main as llada
from rl.config.diffusion import DiffusionModelConfig
from rl.diffusion.model import load_diffusion_model
from rl.diffusion.policy import DiffusionPolicy
from tests.diffusion.conftest import MASK, set_trap


@pytest.fixture(autouse=True)
def always_yes(monkeypatch):
    """The answers of a person who agrees with everything."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")


@pytest.fixture
def folder(hub_llada, tmp_path) -> Path:
    """A LLaDA folder whose tokenizer is code of its own too, with its files in transformers' form."""
    copy = tmp_path / "llada"
    shutil.copytree(hub_llada, copy)
    set_trap(copy)
    change(copy / "tokenizer_config.json", tokenizer_class="TrapTokenizer", auto_map=OWN_TOKENIZER)
    return copy


OWN_TOKENIZER = {"AutoTokenizer": ["trap.Tokenizer", None]}


def change(file: Path, **keys: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def rows(folder: Path) -> str:
    (folder / "rows.jsonl").write_text('{"prompt": "What is w1", "completion": "w2", "answer": "2"}\n')
    return str(folder / "rows.jsonl")


def policy_of(folder: Path) -> DiffusionPolicy:
    config = DiffusionModelConfig(name=str(folder), dtype="fp32")
    return DiffusionPolicy(config, Accelerator(cpu=True), name=str(folder))


@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_a_llada_folder_is_read_without_its_code(hub_llada, folder, own_tokenizer):
    source = folder if own_tokenizer else hub_llada
    policy = policy_of(source)
    assert policy.mask_token_id == MASK
    assert policy.tokenizer("What is w3")["input_ids"] == [6, 7, 11]
    assert evaluate([str(source), "--perplexity", rows(folder)]) == 0
    assert not (source / "trapped").exists()


def test_dreams_tokenizer_is_qwens(folder):
    """Its class is code of its folder, and there is no tokenizer.json: vocab.json and merges.txt."""
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({"a": 0, "<eos>": 1, "b": 2, "<mask>": 3, "ab": 4}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    change(folder / "tokenizer_config.json", tokenizer_class="DreamTokenizer")
    tokenizer = policy_of(folder).tokenizer
    assert isinstance(tokenizer, Qwen2Tokenizer)
    assert tokenizer("abb")["input_ids"] == [4, 2]
    assert not (folder / "trapped").exists()


def test_what_only_its_own_code_reads_is_refused(folder, capsys):
    (folder / "tokenizer.json").unlink()
    options = [str(folder), "--perplexity", rows(folder)]
    assert evaluate(options) == 1
    said = "its tokenizer TrapTokenizer is code of its own folder, which is never run; put a tokenizer.json"
    assert said in capsys.readouterr().err
    change(folder / "config.json", model_type="mystery", architectures=["Mystery"])
    with pytest.raises(
        ValueError, match=r"its model_type 'mystery' is code of its own folder, which is never"
    ):
        load_diffusion_model(str(folder), mask_token_id=MASK)
    assert not (folder / "trapped").exists()


def test_a_random_shape_of_a_model_with_its_own_code_is_refused(folder, capsys):
    change(folder / "config.json", model_type="mystery", architectures=["Mystery"])
    shutil.copy(folder / "tokenizer_config.json", folder / "old.json")
    config = folder / "run.yaml"
    config.write_text(f"data: {{source: {rows(folder)}, max_length: 64}}\n")
    keys = [f"model={{name: {folder}, from_scratch: {{}}}}", f"run_dir={folder / 'run'}"]
    assert llada([str(config), *keys]) == 1
    assert "is code of its own folder, which is never run" in capsys.readouterr().err
    assert not (folder / "trapped").exists()


@pytest.mark.parametrize("kind", ["llada", "converted"])
def test_a_diffusion_checkpoint_in_a_config_without_the_section_is_called_one(
    kind, folder, tiny_model_dir, tmp_path, capsys
):
    name = folder
    if kind == "converted":
        name = tmp_path / "converted"
        load_diffusion_model(str(tiny_model_dir), mask_token_id=2).save_pretrained(name)
        shutil.copy(tiny_model_dir / "tokenizer.json", name)
        shutil.copy(tiny_model_dir / "tokenizer_config.json", name)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{name: {name}}}\nrun_dir: {tmp_path / 'run'}\ndata: {{source: {rows(folder)}}}\n"
    )
    said = "this is a masked diffusion model; add a `diffusion:` section to the config"
    for command in (grpo, lambda argv: cohort(["plan", *argv, "--gpu-gib", "80"])):
        assert command([str(config)]) == 1
        error = capsys.readouterr().err
        assert said in error and "or use recipes.llada" in error
    assert not (folder / "trapped").exists()
