"""`cohort plan` judges the config that it is given, and a run chooses what it leaves open."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import LlamaConfig, Qwen3MoeConfig

from recipes.cli import main as cohort
from recipes.fit import as_before, fit_to, read_plan
from recipes.kinds import size_of
from rl.config.read import dump_config, load_config, replaced
from rl.model.units import check_shardable
from rl.plan.memory import GIB, Card
from rl.plan.search import kept_whole
from tests.rl.families import tiny_config

OPEN = ["engine.name=auto", "train.token_budget=auto"]


def test_what_is_open_is_chosen_and_said(config_file, capsys):
    words = ["plan", str(config_file), "--gpu-gib", "24", *OPEN]
    assert cohort(words) == 0
    out = capsys.readouterr().out
    chosen = out.split("\nfits with ")[1].split()
    assert [word.partition("=")[0] for word in chosen] == [
        "model.gradient_checkpointing",
        "engine.gpu_memory_utilization",
        "engine.max_num_seqs",
        "model.keep_logits",
        "train.token_budget",
    ]
    assert cohort([*words, *chosen]) == 0
    assert capsys.readouterr().out.endswith("\nfits\n")


def test_parts_are_what_a_run_takes(config_file, capsys):
    words = ["plan", str(config_file), "--gpu-gib", "24", *OPEN, "engine.gpu_memory_utilization=0.5"]
    assert cohort(words) == 0
    out = capsys.readouterr().out
    # Half of 24 GiB is the engine's, whatever a tiny model needs; 3 GiB of it are its overhead.
    assert gib(out, "engine cache") == pytest.approx(12 - 3, abs=0.05)
    # A chunk of logits is 1 GiB, and in fp32 four are held at once.
    assert gib(out, "predicted") == pytest.approx(12 + gib(out, "overhead") + 4.0, abs=0.1)


def test_what_is_given_and_does_not_fit_is_answered_with_words_to_copy(config_file, capsys):
    words = ["plan", str(config_file), "--gpu-gib", "24", *OPEN, "engine.gpu_memory_utilization=0.95"]
    assert cohort(words) == 1
    said = capsys.readouterr()
    (advice,) = re.findall("it does with: (.*)", said.out + said.err)
    assert advice == "engine.gpu_memory_utilization=auto"
    assert cohort([*words, *advice.split()]) == 0


def test_the_transformers_engine_reserves_nothing(config_file, capsys):
    assert cohort(["plan", str(config_file), "--gpu-gib", "24", "engine.gpu_memory_utilization=0.9"]) == 0
    assert gib(capsys.readouterr().out, "predicted") < 6  # 1.5 of overhead and 4 of logits


def test_a_gpu_that_holds_nothing_of_it_is_named(config_file, capsys):
    assert cohort(["plan", str(config_file), "--gpu-gib", "2", *OPEN]) == 1
    err = capsys.readouterr().err
    assert "does not fit a GPU of 2 GiB, and neither do adapters and short completions" in err


@pytest.mark.parametrize(("processes", "code"), [(2, 0), (3, 1), (0, 1)])
def test_a_plan_is_for_a_number_of_processes(config_file, capsys, processes, code):
    words = ["plan", str(config_file), "--gpu-gib", "24", *OPEN, "train.prompts_per_step=4"]
    assert cohort([*words, "--processes", str(processes)]) == code
    if code:
        assert "3 processes; use prompts_per_step=" in (err := capsys.readouterr().err) or "at least 1" in err


@pytest.mark.parametrize("size", ["0", "-3", "nan", "inf"])
def test_a_gpu_without_memory_is_refused(config_file, capsys, size):
    assert cohort(["plan", str(config_file), "--gpu-gib", size]) == 1
    assert f"--gpu-gib {size} is not a GPU's memory" in capsys.readouterr().err


def test_a_diffusion_model_is_planned_without_a_share_of_vllm(tmp_path, capsys):
    shape = LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    shape.save_pretrained(tmp_path / "model")
    file = Path(__file__).parents[2] / "recipes" / "configs" / "llada_rl_chain_sum.yaml"
    words = [f"model.name={tmp_path}/model", "train.token_budget=auto", "model.gradient_checkpointing=auto"]
    assert cohort(["plan", str(file), "--gpu-gib", "24", *words]) == 0
    out = capsys.readouterr().out
    assert "train.token_budget=" in out.split("\nfits with ")[1]
    assert "gpu_memory_utilization" not in out and "engine overhead" not in out


SERVED = ["engine.name=server", "engine.urls=[http://127.0.0.1:1]", "engine.token_file=token"]


@pytest.fixture
def mixture(tmp_path) -> Path:
    """Qwen3-30B-A3B with 126 experts instead of 128: 56 GiB in bf16."""
    heads: dict = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 126}
    sizes = {"vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768}
    Qwen3MoeConfig(**heads, **sizes, num_hidden_layers=48).save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


@pytest.mark.parametrize(
    ("processes", "words", "reason"),
    [
        (2, [], None),
        (4, [], "adapters of its 126 experts cannot be dealt to 4 processes evenly"),
        (4, ["model.lora={r: 16, target_modules: [q_proj]}"], None),
        (2, ["memory.optimizer_on_host=true"], "memory.reference_on_host keep whole ones in host memory"),
        (2, ["teacher={demonstration: solution, divergence: reverse}"], "by sampled tokens only"),
    ],
)
def test_auto_splits_nothing_that_full_would_refuse_and_says_it_in_the_same_words(
    mixture, processes, words, reason
):
    """Whole weights do not fit 48 GiB; a half or a quarter does."""
    given = [f"model.name={mixture}", "model.lora={r: 16}", "train.prompts_per_step=4", *SERVED, *words]
    config, card = load_config(None, given), Card("NVIDIA L40S", 48 * GIB, processes)
    if reason is None:
        assert fit_to(config, card).chosen["train.sharding"] == "full"
        return
    with pytest.raises(ValueError, match="this run does not fit") as refused:
        fit_to(config, card)
    said = str(refused.value).partition("train.sharding=auto keeps whole copies: ")[2]
    assert reason in said.partition("; it does with")[0].partition(", and neither")[0]
    with pytest.raises(ValueError, match=r"train\.sharding") as of_full:
        full = load_config(None, [*given, "train.sharding=full"])
        check_shardable(size_of(config, full.model).without_storage(full.model), processes)
    assert reason in str(of_full.value)


@pytest.mark.parametrize(("router", "reason"), [("auto", "several dtypes"), ("freeze", "None")])
def test_auto_counts_only_dtypes_that_are_trained(tmp_path, router, reason):
    """Routers of this family stay fp32."""
    tiny_config("hunyuan_v1_moe").save_pretrained(tmp_path)
    config = load_config(None, [f"model.name={tmp_path}", "model.dtype=bf16", f"moe.router={router}"])
    assert reason in str(kept_whole(size_of(config, config.model), config, 2))


CARDS = [Card("NVIDIA H100", 80 * GIB), Card("NVIDIA L4", 24 * GIB)]


def test_a_run_that_goes_on_keeps_its_values_on_its_card_alone(config_file):
    config = load_config(config_file, OPEN)
    first = fit_to(config, CARDS[0])
    config.run_dir.mkdir(parents=True, exist_ok=True)
    before = {
        "card": {"name": "NVIDIA H100", "capacity": 80 * GIB, "processes": 1},
        "chosen": dict(first.chosen) | {"train.token_budget": 1234},
    }
    same, other = (fit_to(config, card, before) for card in CARDS)
    assert same.config.train.token_budget == 1234 and len(same.notes) == 1
    assert other.config.train.token_budget != 1234
    assert "planned anew, as the run began on 1 x NVIDIA H100: " in other.notes[1]
    assert "train.token_budget 1234 -> " in other.notes[1]


def test_a_plan_says_what_it_pins_and_refuses_what_the_host_lacks(config_file):
    given = load_config(config_file, [*OPEN, "memory.optimizer_on_host=true"])
    with pytest.raises(ValueError, match=r"in host memory, and may take 0\.0; use memory\.optimizer"):
        fit_to(given, Card("NVIDIA H100", 80 * GIB, host=1000))
    fitted = fit_to(given, Card("NVIDIA H100", 80 * GIB, host=10 * GIB))
    assert "each process pins 0.0 GiB of host memory of 10.0 that it may take" in fitted.notes[0]


@pytest.mark.parametrize(
    ("chosen", "given"),
    [
        ({"train.sharding": "full"}, "memory.optimizer_on_host=true"),
        ({"memory.engine_sleeps": True}, "train.sample_while_training=true"),
    ],
)
def test_a_plan_that_excludes_what_is_given_now_is_made_anew(config_file, chosen, given):
    card = Card("NVIDIA H100", 80 * GIB, 2)
    config = load_config(config_file, [*OPEN, given])
    known = {"card": {"name": card.name, "capacity": card.capacity, "processes": 2}, "chosen": chosen}
    fitted = fit_to(config, card, known)
    assert fitted.chosen.keys().isdisjoint(chosen) and fitted.plan is not None and fitted.plan.fits


def test_a_folder_from_before_the_planner_keeps_what_its_config_says(config_file, tmp_path):
    config = load_config(config_file, [*OPEN, f"run_dir={tmp_path}/run"])
    config.run_dir.mkdir()
    stored = replaced(config, {"train.token_budget": 2048, "model.gradient_checkpointing": True})
    (config.run_dir / "config.yaml").write_text(dump_config(stored))
    on_a_gpu = fit_to(config, CARDS[0], read_plan(config))
    for kept in (as_before(config, read_plan(config)), on_a_gpu):
        assert (kept.config.train.token_budget, kept.config.model.gradient_checkpointing) == (2048, True)
    assert len(on_a_gpu.notes) == 1 and isinstance(on_a_gpu.config.engine.max_num_seqs, int)


def test_a_value_that_was_given_once_stays_when_it_is_not_given_again(config_file, tmp_path):
    config = load_config(config_file, [*OPEN, f"run_dir={tmp_path}/run"])
    config.run_dir.mkdir()
    for place, card in ((None, Card("cpu", 0)), (CARDS[0], CARDS[0])):
        given = replaced(config, {"train.token_budget": 512, "model.gradient_checkpointing": True})
        fitted = as_before(given, None, card) if place is None else fit_to(given, place)
        fitted.write()
        (config.run_dir / "config.yaml").write_text(dump_config(fitted.config))
        before = read_plan(config)
        again = as_before(config, before, card) if place is None else fit_to(config, place, before)
        assert (again.config.train.token_budget, again.config.model.gradient_checkpointing) == (512, True)


def test_where_the_engine_takes_no_share_a_given_config_is_not_refused(config_file):
    words = ["engine.name=transformers", "train.token_budget=512", "engine.max_num_seqs=8"]
    config = load_config(config_file, [*words, "model.gradient_checkpointing=false"])
    fitted = fit_to(config, Card("a GPU", 1 * GIB))
    assert fitted.chosen == {} and "the probe will say" in fitted.notes[0]


def test_what_was_planned_is_read_back_and_a_damaged_file_is_not(config_file, tmp_path):
    config = load_config(config_file, [*OPEN, f"run_dir={tmp_path}/run"])
    config.run_dir.mkdir()
    fitted = fit_to(config, CARDS[0])
    fitted.write()
    (config.run_dir / "config.yaml").write_text(dump_config(fitted.config))
    kept = read_plan(config)
    assert kept is not None and kept["chosen"] == fitted.chosen
    parts = json.loads((config.run_dir / "plan.json").read_text())["parts"]
    assert sum(part["bytes"] for part in parts) == fitted.plan.total
    (config.run_dir / "config.yaml").write_text(dump_config(fitted.config))
    (config.run_dir / "plan.json").write_text("{")
    assert read_plan(config) == {"card": None, "chosen": fitted.chosen}


def gib(out: str, name: str) -> float:
    (found,) = re.findall(rf"^{name} +([\d.]+) GiB", out, re.MULTILINE)
    return float(found)
