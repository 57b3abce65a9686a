"""Bad configs get a sentence with the cause and the remedy, before any model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl.config import Config, check_processes
from rl.config.diffusion import DiffusionConfig
from rl.config.diffusion_rl import MaskedRunConfig
from rl.config.read import dump_config, flatten, load_config, read_config
from rl.config.sft import SftConfig
from rl.config.traces import PipelineConfig, TracesConfig

CONFIGS = sorted((Path(__file__).parents[2] / "recipes" / "configs").glob("*.yaml"))


OTHERS = {"gsm8k_traces": TracesConfig} | dict.fromkeys(
    ("pipeline_gsm8k", "pipeline_sums", "pipeline_python_tool"), PipelineConfig
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_load_and_survive_a_round_trip(path, tmp_path):
    schema = DiffusionConfig if path.stem.startswith(("llada_sft", "llada_pretrain")) else Config
    schema = SftConfig if path.stem.startswith("moe_sft") else schema
    schema = MaskedRunConfig if path.stem.startswith("llada_rl") else schema
    schema = OTHERS.get(path.stem, schema)
    config = read_config(schema, path)
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert read_config(schema, tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.learning_rate=1",
            "optimizer.learning_rate: unknown key; section optimizer has: lr, betas",
        ),
        ("train.group_sise=8", "train.group_sise: unknown key; did you mean group_size?"),
        ("samplign.top_p=0.9", "samplign: unknown key; did you mean sampling?"),
        ("rewards.functions=[{name: math, wieght: 2}]", "did you mean weight?"),
        ("train.steps=abc", "train.steps='abc': Input should be a valid integer"),
        ("train.steps=yes", "train.steps=True: must be a number, not a switch (YAML reads yes, no"),
        ("optimizer.lr=true", "optimizer.lr=True: must be a number, not a switch"),
        ("train.token_budget=true", "train.token_budget=True: must be a number, not a switch"),
        ("train.in_flight=on", "train.in_flight=True: must be a number, not a switch"),
        ("optimizer.betas=[true, 0.9]", "optimizer.betas=[True, 0.9]: must be a number, not a switch"),
        (
            "sampling.stop_token_ids=[2, no]",
            "sampling.stop_token_ids=[2, False]: must be a number, not a switch",
        ),
        (
            "rewards.functions=[{name: math, clip: [no, 1]}]",
            "clip=[False, 1]: must be a number, not a switch",
        ),
        ("optimizer.lr=-1", "optimizer.lr=-1: Input should be greater than 0"),
        ("loss.name=ppo", "loss.name='ppo'"),
        ("sampling.temperature=0", "draws the same completion G times"),
        ("sampling.top_p=0.9", "the importance ratio of a cut distribution"),
        ("sampling.top_k=50", "evaluation.sampling may cut"),
        ("train.group_size=1", "use train.group_size >= 2"),
        ("train.num_minibatches=3", "use num_minibatches in [1, 2, 4, 8]"),
        ("loss.dual_clip=1.1", "loss.dual_clip=1.1 must be above 1 + loss.clip_high"),
        ("rewards.functions=[{name: math, requires: think_format}]", "not among ['math']"),
        ("train.steps", "must look like key.sub=value"),
        ("data.columns=[a", "override 'data.columns=[a': the value is not valid YAML"),
        ("train.in_flight=64", "train.in_flight=64 does nothing under train.max_staleness=0"),
    ],
)
def test_a_bad_value_names_the_key_the_rule_and_the_remedy(override, message):
    with pytest.raises(ValueError) as caught:
        load_config(None, [override])
    assert message in " ".join(str(caught.value).split())


def test_every_fault_is_listed_at_once():
    with pytest.raises(ValueError, match="3 faults") as caught:
        load_config(None, ["train.steps=0", "train.sed=1", "optimizer.lr=0"])
    assert "did you mean seed" in str(caught.value)


def test_a_config_of_another_command_is_recognised():
    for path in CONFIGS:
        fits = DiffusionConfig if path.stem.startswith(("llada_sft", "llada_pretrain")) else Config
        fits = OTHERS.get(path.stem, SftConfig if path.stem.startswith("moe_sft") else fits)
        wrong, command = {
            DiffusionConfig: (Config, "python -m recipes.llada"),
            Config: (DiffusionConfig, "cohort train"),
            SftConfig: (Config, "python -m recipes.sft"),
            TracesConfig: (Config, "cohort sample"),
            PipelineConfig: (Config, "python -m recipes.pipeline"),
        }[fits]
        for overrides in ([], ["train.stepz=3"]):
            with pytest.raises(ValueError, match=f"this looks like a config of `{command}`"):
                read_config(wrong, path, overrides)
    with pytest.raises(ValueError, match="unknown key; did you mean max_prompt_length") as caught:
        load_config(CONFIGS[0].parent / "quickstart.yaml", ["data.max_length=8"])
    assert "another command" not in str(caught.value)
    with pytest.raises(ValueError, match=r"stages\.0\.name: must be given") as caught:
        read_config(PipelineConfig, None, ["stages=[{nam: a, recipe: sft}]"])
    assert "another command" not in str(caught.value)
    with pytest.raises(ValueError, match=r"='math': takes keys and values, such as \{name: math\}"):
        load_config(None, ["rewards.functions=[math]"])


def test_a_tree_is_flattened_to_the_names_that_overrides_use():
    tree = {"train": {"steps": 3, "more": {"deep": [1, {"a": 2}]}}, "options": {}, 7: None}
    flat = {"train.steps": 3, "train.more.deep": [1, {"a": 2}], "options": {}, "7": None}
    assert flatten(tree) == flat and flatten({}) == {}


def test_scientific_notation_is_a_number():
    assert load_config(None, ["optimizer.lr=1e-5"]).optimizer.lr == 1e-5


def test_an_evaluation_metric_must_be_a_reward_of_the_run():
    with pytest.raises(ValueError, match=r"evaluation.metric='acc' is not a reward of this run"):
        load_config(None, ["evaluation.metric=acc", "evaluation.data={source: 'x'}"])


def test_stale_samples_need_the_sampler_correction():
    with pytest.raises(ValueError, match=r"leave loss\.sampler_correction at its default"):
        load_config(None, ["train.max_staleness=1", "loss.sampler_correction=null"])


@pytest.mark.parametrize(
    ("overrides", "number"),
    [
        ([], 256),
        (["train.prompts_per_step=32", "train.max_staleness=1"], 512),
        (["train.prompts_per_step=32", "train.max_staleness=1", "train.in_flight=300"], 300),
        (["train.prompts_per_step=320"], 512),
        (["train.prompts_per_step=320", "engine.max_num_seqs=700"], 700),
    ],
)
def test_an_engine_samples_together_what_is_in_flight(overrides, number):
    assert load_config(None, overrides).max_num_seqs == number


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        ((), 0.2),
        (("model.dtype=fp32",), None),  # the engine's dtype decides
        (("model.dtype=fp32", "engine.dtype=bfloat16"), 0.2),
        (("engine.dtype=float32",), 0.2),  # the policy itself computes in bf16
        (("engine.canary_tolerance=0.1",), 0.1),
    ],
)
def test_a_canary_in_bf16_has_the_tolerance_of_bf16(overrides, tolerance):
    assert load_config(None, overrides).canary_tolerance == tolerance


@pytest.mark.parametrize(
    ("overrides", "is_corrected"),
    [
        ((), False),
        (("loss.clip_low=0.3",), False),  # one key of a section changes no other
        (("diffusion.estimator.name=trace",), True),
        (("diffusion.estimator.name=trace", "loss.clip_low=0.3"), True),
        (("diffusion.estimator.name=trace", "loss.sampler_correction=null"), False),
    ],
)
def test_a_diffusion_run_corrects_traces_alone(overrides, is_corrected):
    config = load_config(None, ("diffusion.block_length=8", *overrides))
    assert isinstance(config, MaskedRunConfig)
    assert (config.loss.sampler_correction is not None) == is_corrected


def test_a_diffusion_run_refuses_to_keep_logits():
    words = ["diffusion.block_length=8", "model.keep_logits=true"]
    with pytest.raises(ValueError, match=r"model\.keep_logits=true does nothing for a diffusion model"):
        load_config(None, words)


def test_at_least_one_group_is_in_flight():
    with pytest.raises(ValueError, match=r"use train\.in_flight=8 or more"):
        load_config(None, ["train.max_staleness=1", "train.in_flight=7"])


def test_groups_must_split_over_processes():
    config = load_config(None, ["train.prompts_per_step=6"])
    check_processes(config, 3)
    with pytest.raises(ValueError, match="use prompts_per_step=4 or 8"):
        check_processes(config, 4)


def test_a_file_that_is_no_yaml_is_named(tmp_path):
    (tmp_path / "c.yaml").write_text("train: [1\n")
    with pytest.raises(ValueError, match=r"c\.yaml is not valid YAML: .*line 2"):
        load_config(tmp_path / "c.yaml")


def test_a_wrong_path_names_the_near_one():
    with pytest.raises(ValueError, match=r"did you mean .*quickstart\.yaml"):
        load_config(CONFIGS[0].parent / "quickstrat.yaml")


def test_at_most_twelve_fields_per_level():
    def sections(model):
        yield model
        for field in model.model_fields.values():
            for argument in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if isinstance(argument, type) and hasattr(argument, "model_fields"):
                    yield from sections(argument)

    # Names that are frozen: data.rename, data.chat_template_kwargs, data.too_long and one more beside them;
    # of Config itself they are sections; of EngineConfig engine.urls, token_file and where weights are.
    limits = {"Config": 17, "DataConfig": 16, "HeldoutConfig": 17, "TrainConfig": 13, "EngineConfig": 16}
    crowded = {s.__name__: len(s.model_fields) for s in sections(Config)}
    assert {name: n for name, n in crowded.items() if n > limits.get(name, 12)} == {}
