"""A model folder that brings Python code: refused in words, without a question, and nothing of it runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from recipes.cli import main as cohort
from recipes.grpo import main
from rollout.transformers import TransformersEngine


def with_code(folder: Path, target: Path, *parts: str) -> Path:
    """A copy of the model whose config, tokenizer or model class is code that leaves the file `ran`."""
    shutil.copytree(folder, target)
    (target / "own.py").write_text(
        f"open({str(target.parent / 'ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = json.loads((target / "config.json").read_text())
    if "config" in parts:
        config |= {"model_type": "own", "architectures": ["OwnModel"]}
        config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (target / "config.json").write_text(json.dumps(config))
    if "tokenizer" in parts:
        path = target / "tokenizer_config.json"
        own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
        path.write_text(json.dumps(json.loads(path.read_text()) | own))
    return target


@pytest.fixture(autouse=True)
def a_user_who_says_yes(monkeypatch):
    """transformers asks by input(), with a limit of 15 s."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")


@pytest.mark.parametrize("parts", [("config",), ("tokenizer",), ("config", "tokenizer")])
def test_code_of_a_model_folder_is_refused_and_never_run(config_file, tiny_model_dir, capsys, parts):
    folder = with_code(tiny_model_dir, config_file.parent / "own", *parts)
    assert main([str(config_file), f"model.name={folder}"]) == 1
    error = capsys.readouterr().err
    assert f"model.name='{folder}' needs Python code that comes with it" in error
    assert "Traceback" not in error and not (config_file.parent / "ran").exists()


def test_a_plan_and_an_engine_run_no_code_of_a_model_folder_either(config_file, tiny_model_dir, capsys):
    folder = with_code(tiny_model_dir, config_file.parent / "own", "config")
    assert cohort(["plan", str(config_file), f"model.name={folder}", "--gpu-gib", "80"]) == 1
    assert "needs Python code that comes with it" in capsys.readouterr().err
    with pytest.raises(ValueError, match="trust_remote_code"):
        TransformersEngine(str(folder), None)
    assert not (config_file.parent / "ran").exists()
