"""`cohort config` takes the configs of every command, and its output is a config that explains itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from recipes.cli import main
from rl.config import Config
from rl.config.describe import described
from rl.config.diffusion import DiffusionConfig
from rl.config.diffusion_rl import MaskedRunConfig
from rl.config.read import read_any_config, read_config
from rl.config.sft import SftConfig
from rl.config.traces import PipelineConfig, TracesConfig

CONFIGS = sorted((Path(__file__).parents[2] / "recipes" / "configs").glob("*.yaml"))


def kind_of(path: Path) -> type:
    if path.stem.startswith(("llada_sft", "llada_pretrain")):
        return DiffusionConfig
    if path.stem.startswith("moe_sft"):
        return SftConfig
    if path.stem == "gsm8k_traces" or path.stem.startswith("pipeline_"):
        return TracesConfig if path.stem == "gsm8k_traces" else PipelineConfig
    return MaskedRunConfig if path.stem.startswith("llada_rl") else Config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_cohort_config_prints_every_shipped_config_as_itself(path, tmp_path, capsys):
    schema = kind_of(path)
    assert main(["config", str(path), "run_dir=elsewhere"]) == 0
    out = capsys.readouterr().out
    commands = {DiffusionConfig: "python -m recipes.llada", SftConfig: "python -m recipes.sft"}
    commands |= {TracesConfig: "cohort sample", PipelineConfig: "python -m recipes.pipeline"}
    command = commands.get(schema, "cohort train")
    assert out.startswith(f"# of `{command}`: every key, and what it means\n")
    (tmp_path / "c.yaml").write_text(out)
    expected = read_config(schema, path, ["run_dir=elsewhere"])
    assert read_config(schema, tmp_path / "c.yaml") == expected
    assert yaml.safe_load(out) == expected.model_dump(mode="json")


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "llada_sft_8b",
            [
                "  token_budget: 16384  # packed tokens of one forward pass; auto: what fits, 8192 on a CPU",
                "  mask_token: null  # token or id; default: the checkpoint's own, else a spare",
                "eos:  # What follows an answer. End-of-text padding is part of the",
                "  normaliser: sequence  # each example counts equally (LLaDA), or each token does; one of",
            ],
        ),
        (
            "llada_rl_gsm8k",
            [
                "  threshold: null  # also commits tokens of higher probability; default: off; above 0",
                "    merge: 8  # steps of the sampler that share a canvas; trace only; at least 1; default 1",
            ],
        ),
        ("llada_sft_chain_sum", ["    #   r: 16  # rank; at least 1"]),
        ("quickstart", ["    #   alpha: 32  # deltas are scaled by alpha / r; at least 1"]),
    ],
)
def test_every_key_says_what_it_means_also_of_sections_that_are_off(name, lines):
    config = read_any_config(next(path for path in CONFIGS if path.stem == name))
    shown = described(config).splitlines()
    assert [line for line in lines if not any(found.startswith(line) for found in shown)] == []


def test_text_of_several_lines_and_marks_of_comments_survive(tmp_path):
    path = tmp_path / "c.yaml"
    texts = {
        "source": "a # b",
        "system_prompt": "one\n\n# two\n",
        "options": {"deep": {"x: #": ["y\n", None]}},
    }
    path.write_text(yaml.safe_dump({"data": texts | {"max_length": 7}}))
    config = read_any_config(path)
    assert isinstance(config, DiffusionConfig)
    path.write_text(described(config))
    assert read_config(DiffusionConfig, path) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "data: {source: x, max_length: 9}\neos: {polici: single}",
            "eos.polici: unknown key; did you mean policy",
        ),
        (
            "objective: {}\ndata: {source: x, max_lenght: 9}",
            "data.max_lenght: unknown key; did you mean max_len",
        ),
        ("diffusion: {blok_length: 8}", "diffusion.blok_length: unknown key; did you mean block_length"),
        (
            "train: {steps: 9}\ndiffusion: {blok_length: 8, remask: x}",
            "diffusion.blok_length: unknown key; did you mean block_length",
        ),
        ("loss: {nam: grpo}", "loss.nam: unknown key; did you mean name"),
    ],
)
def test_a_fault_is_that_of_the_command_that_the_config_is_for(tmp_path, capsys, text, message):
    (tmp_path / "c.yaml").write_text(text)
    assert main(["config", str(tmp_path / "c.yaml")]) == 1
    error = capsys.readouterr().err
    assert message in error and f"{error.count('unknown key')} fault" in error
