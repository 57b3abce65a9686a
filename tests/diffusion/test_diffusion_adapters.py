"""Adapters of diffusion models: every reader finds their base, their mask token and their alignment again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file, save_file

from recipes.evaluate_llada import main as evaluate
from recipes.grpo import main as grpo
from recipes.llada import main as train
from rl.config.diffusion import DiffusionConfig, DiffusionModelConfig
from rl.config.read import load_config, read_config
from rl.diffusion.harness import DiffusionHarness
from rl.diffusion.likelihood import bound_log
from rl.diffusion.model import DiffusionScorer, hidden_states, is_shifted, load_diffusion_model, logits_at
from rl.diffusion.policy import DiffusionPolicy
from rl.diffusion.rl_policy import MaskedPolicy
from rl.model.bidirectional import Documents
from tests.diffusion.conftest import MASK

UNK = 2
KINDS = {  # keys, mask token, shift: LLaDA's folder says both, of a converted model nothing but the run does
    "llada": ([], MASK, False),
    "converted": (["model.mask_token=<unk>", "model.shift=true"], UNK, True),
}
STEPS = 3


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    pairs = [{"prompt": f"What is w{i}", "completion": f"w{i} w{i + 1}"} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return file


def run(base: Path, rows: Path, run_dir: Path, *overrides: str) -> Path:
    """The newest checkpoint of a run that trains adapters."""
    config = rows.parent / "config.json"
    data = {"source": str(rows), "max_length": 32}
    keys = {
        "model": {"name": str(base), "dtype": "fp32", "lora": {"r": 4}},
        "data": data,
        "train": {"steps": STEPS, "examples_per_step": 4},
        "optimizer": {"lr": 3e-2, "warmup_steps": 0},
        "evaluation": {"data": data, "num_draws": 64},
    }
    config.write_text(json.dumps(keys))
    assert train([str(config), f"run_dir={run_dir}", *overrides]) == 0
    return max((run_dir / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def base(kind, hub_llada, tiny_model_dir) -> Path:
    return hub_llada if kind == "llada" else tiny_model_dir


@pytest.fixture(scope="module")
def adapter(kind, base, rows, tmp_path_factory) -> Path:
    return run(base, rows, tmp_path_factory.mktemp(kind) / "run", *KINDS[kind][0])


def logits(model) -> torch.Tensor:
    ids = torch.tensor([5, 9, MASK, UNK, 30, 7, MASK])
    documents = Documents.of([len(ids)])
    with torch.no_grad():
        return logits_at(model, hidden_states(model, ids, documents), torch.arange(len(ids)), documents)


def test_the_evaluator_finds_the_bound_of_the_run(adapter, rows, capsys):
    before, after = bound_log(adapter.parents[1]).read().values()
    assert evaluate([str(adapter), "--perplexity", str(rows), "--num-draws", "512"]) == 0
    found = float(re.findall(r"at most ([0-9.]+) \+-", capsys.readouterr().out)[0])
    assert found == pytest.approx(after.nats_per_token, rel=0.02)
    assert found != pytest.approx(before.nats_per_token, rel=0.1)


def test_peft_loads_the_adapter_onto_the_base_that_it_names(adapter, kind, base):
    """Peft's own reading, unmerged, against ours."""
    _, mask, shift = KINDS[kind]
    named = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    assert named == str(base)
    plain = load_diffusion_model(named, mask_token_id=mask, shift=shift)
    before = logits(plain)
    theirs = logits(PeftModel.from_pretrained(plain, str(adapter)).get_base_model())
    ours = load_diffusion_model(str(adapter))
    assert (ours.config.mask_token_id, is_shifted(ours)) == (mask, shift)
    torch.testing.assert_close(logits(ours), theirs, rtol=1e-4, atol=1e-4)
    assert (theirs - before).abs().max() > 0.01


def test_the_harness_scores_what_the_policy_scores(adapter, kind):
    _, mask, shift = KINDS[kind]
    policy = DiffusionPolicy(
        DiffusionModelConfig(name=str(adapter), dtype="fp32"), Accelerator(cpu=True), name=str(adapter)
    )
    assert (policy.mask_token_id, is_shifted(policy.model)) == (mask, shift)
    request = type("Request", (), {"args": ("What is w3", " w3 w4")})()
    model = load_diffusion_model(str(adapter))
    found = [
        DiffusionHarness(scorer, policy.tokenizer, mask_token_id=mask, num_draws=64).loglikelihood([request])
        for scorer in (policy.scorer, DiffusionScorer(model))
    ]
    assert found[0][0][0] == pytest.approx(found[1][0][0], rel=1e-5)


def test_a_run_with_adapters_goes_on_bit_by_bit(kind, base, rows, tmp_path):
    keys = [*KINDS[kind][0], "evaluation.data=null"]
    whole = run(base, rows, tmp_path / "whole", *keys)
    run(base, rows, tmp_path / "parts", *keys, "train.steps=1")
    parts = run(base, rows, tmp_path / "parts", *keys)
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_rewards_start_from_an_adapter(adapter, kind, rows, tmp_path, capsys):
    """Its own tokenizer, mask token and alignment; a config without `diffusion` is refused."""
    keys = [
        f"model={{name: {adapter}, dtype: fp32}}",
        f"run_dir={tmp_path / 'rl'}",
        f"data.source={rows}",
        "sampling.max_completion_length=8",
        "rewards.functions=[{name: think_format}]",
        "train={steps: 1, prompts_per_step: 2, group_size: 2}",
        "loss.kl_coef=0",
    ]
    (tmp_path / "rl.yaml").write_text("{}")
    assert grpo([str(tmp_path / "rl.yaml"), *keys, "diffusion={block_length: 4}"]) == 0
    config = load_config(None, [*keys, "diffusion={block_length: 4}"])
    policy = MaskedPolicy(config, Accelerator(cpu=True), name=str(adapter))  # type: ignore[arg-type]
    assert (policy.trained.mask_token_id, is_shifted(policy.model)) == KINDS[kind][1:]
    torch.testing.assert_close(logits(policy.model), logits(load_diffusion_model(str(adapter))))
    capsys.readouterr()
    assert grpo([str(tmp_path / "rl.yaml"), *keys, f"run_dir={tmp_path / 'causal'}"]) == 1
    assert "this is a masked diffusion model; add a `diffusion:` section" in capsys.readouterr().err


def test_adapters_of_adapters_and_other_keys_of_the_run(adapter, kind, rows, tmp_path):
    """A second run on the first one's adapter; what its config names counts, and is written down."""
    second = run(adapter, rows, tmp_path / "second", "model.shift=true", "evaluation.data=null")
    model = load_diffusion_model(str(second))
    assert (model.config.mask_token_id, is_shifted(model)) == (KINDS[kind][1], True)
    assert PeftConfig.from_pretrained(str(second)).base_model_name_or_path == str(adapter)
    assert (logits(model) - logits(load_diffusion_model(str(adapter), shift=True))).abs().max() > 0.01


def test_the_evaluator_says_where_folder_and_option_disagree(adapter, kind, rows, capsys):
    _, mask, shift = KINDS[kind]
    flag, free = {"llada": ("--shift", "w40"), "converted": ("--no-shift", "w70")}[kind]
    capsys.readouterr()
    assert evaluate([str(adapter), "--perplexity", str(rows), "--mask-token", free, flag]) == 0
    out = capsys.readouterr().out
    aligned = "shift" if shift else "no shift"
    assert f"--mask-token {free}: the checkpoint says mask token {mask}" in out
    assert f"{flag}: the checkpoint says {aligned}" in out
    agreeing = ["--mask-token", str(mask), "--shift" if shift else "--no-shift"]
    assert evaluate([str(adapter), "--perplexity", str(rows), *agreeing]) == 0
    assert "the checkpoint says" not in capsys.readouterr().out


def changed(adapter: Path, folder: Path, **settings: object) -> str:
    shutil.copytree(adapter, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return str(folder)


def test_an_adapter_without_a_base_is_refused(adapter, rows, tmp_path, capsys):
    for i, name in enumerate(("None", None, "", str(tmp_path / "copy3"))):
        folder = changed(adapter, tmp_path / f"copy{i}", base_model_name_or_path=name)
        with pytest.raises(ValueError, match=rf"names no base model .*_or_path is {name!r}\); write there"):
            load_diffusion_model(folder)
    assert evaluate([folder, "--perplexity", str(rows)]) == 1
    assert "names no base model" in capsys.readouterr().err


def test_a_base_that_is_gone_or_another_is_named(adapter, kind, base, tiny_model_dir, hub_llada, tmp_path):
    gone = changed(adapter, tmp_path / "gone", base_model_name_or_path="/gone")
    with pytest.raises(ValueError, match=r"its base cannot be read: model '/gone': there is no such folder"):
        load_diffusion_model(gone)
    other = hub_llada if kind == "converted" else tiny_model_dir
    with pytest.raises(ValueError, match=rf"does not fit its base {other}: .*size mismatch"):
        load_diffusion_model(changed(adapter, tmp_path / "other", base_model_name_or_path=str(other)))
    theirs = changed(adapter, tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n.replace("model.layers", "model.transformer.blocks"): t for n, t in tensors.items()}, file)
    with pytest.raises(ValueError, match=rf"does not fit its base {base}: 56 tensors such as"):
        load_diffusion_model(theirs)


def test_random_weights_take_no_adapters():
    keys = ["data.source=x", "model.from_scratch={}", "model.lora={}"]
    with pytest.raises(ValueError, match=r"no checkpoint would hold the random weights"):
        read_config(DiffusionConfig, None, keys)
