"""What README.md and the contract of `rewards` show is run as it stands there."""

import importlib.util
import json
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import yaml
from transformers import Qwen2Config

import rewards
from recipes.cli import COMMANDS
from recipes.cli import main as cohort
from rewards.compose import RewardSpec
from rewards.pool.pool import RewardPool
from rl.types import Completion, Group, Prompt

ROOT = Path(__file__).parents[1]
REWARD = r"```python\n(# my_rewards\.py\n.*?)```"
CHAT = ({"role": "user", "content": "Why?"},)
TEXTS = ["x" * 199, "x" * 200]


@pytest.fixture
def grade(tmp_path, monkeypatch):
    """The scores of two completions, by a function of a module `my_rewards` in the working directory."""
    monkeypatch.chdir(tmp_path)

    def grade_(source, name, messages, **options):
        Path("my_rewards.py").write_text(source)
        pool = RewardPool([RewardSpec(f"my_rewards:{name}", options=options)])
        completions = [Completion([1], [], [True], "stop", [], text=text) for text in TEXTS]
        try:
            (scored,) = pool.score([Group(Prompt("p", "Why?", (1,), messages, {"answer": "x"}), completions)])
        finally:
            pool.close()
        assert pool.faults.num_faulty == 0, str(pool.faults)
        return [reward.score for reward in scored.rewards]

    return grade_


@pytest.mark.parametrize("messages", [CHAT, ()], ids=["chat", "text"])
def test_the_reward_of_the_readme_tells_a_short_completion_from_a_long_one(grade, messages):
    (source,) = re.findall(REWARD, (ROOT / "README.md").read_text(), re.DOTALL)
    (name,) = re.findall(r'"my_rewards:(\w+)"', (ROOT / "README.md").read_text())
    assert grade(source, name, messages) == [1.0, 0.0]


@pytest.mark.parametrize("messages", [CHAT, ()], ids=["chat", "text"])
def test_the_reward_of_the_contract_tells_a_short_completion_from_a_long_one(grade, messages):
    text = rewards.__doc__ or ""
    source = textwrap.dedent(text[text.index("    from rewards.completion") : text.index("    rewards:\n")])
    assert grade(source, "short_and_right", messages, max_chars=199) == [1.0, 0.0]


BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
LINES = [
    words for block in BLOCKS for line in block.splitlines() if (words := shlex.split(line, comments=True))
]
SLOW = {"--processes", "denoising", "serve"}  # two processes; a run of a diffusion model; it does not end


@pytest.fixture
def as_a_reader(tmp_path, tiny_model_dir, monkeypatch):
    """Runs commands in a folder with what the README names: rows.jsonl, CONFIG.yaml and my_rewards.py. Models
    are tiny, and what a config leaves open is small.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COHORT_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"What is w{i} ?", "answer": str(i), "completion": "w1"} for i in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (source,) = re.findall(REWARD, (ROOT / "README.md").read_text(), re.DOTALL)
    Path("my_rewards.py").write_text(source)
    traces = {"data": {"source": "rows.jsonl"}, "run_dir": "runs/traces"}
    traces["sample"] = {"completion_column": "completion", "verify": {"math": 0.0}}
    Path("traces.yaml").write_text(yaml.safe_dump(traces))
    small = {
        "model": {"name": str(tiny_model_dir), "dtype": "fp32"},
        "data": {"source": "rows.jsonl", "max_prompt_length": 64},
        "sampling": {"max_completion_length": 4},
        "engine": {"name": "transformers"},
        "train": {"steps": 1, "prompts_per_step": 2, "group_size": 2},
        "loss": {"kl_coef": 0.0},
    }

    def run(words):
        if words[1] == "init":
            assert cohort(words[1:]) == 0
            made = yaml.safe_load(Path("rows.yaml").read_text())
            for section, values in small.items():
                made[section] = made.get(section, {}) | values
            made["evaluation"]["sampling"]["max_completion_length"] = 4
            Path("rows.yaml").write_text(yaml.safe_dump(made))
            return 0
        others = {"train.max_staleness=1": "runs/ahead"} | {
            w: "runs/reward" for w in words if "rewards." in w
        }
        run_dir = next((folder for word, folder in others.items() if word in words), "runs/config")
        Path("CONFIG.yaml").write_text(yaml.safe_dump(small | {"run_dir": run_dir}))
        words = [word for word in words if not word.startswith(("model.name=", "train.steps="))]
        return cohort(words[1:])

    return run


def test_every_command_of_the_readme_exists():
    assert len(LINES) > 15
    for words in LINES:
        if words[0] == "cohort":
            assert words[1] in COMMANDS, words
        elif words[0] == "accelerate":
            assert importlib.util.find_spec(words[words.index("-m") + 1]) is not None, words
        elif words[0] == "python":
            assert importlib.util.find_spec(words[2]) is not None, words
        else:
            assert words[0] == "make" and f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), words


def test_the_commands_of_the_readme_run_as_they_stand(as_a_reader, capsys):
    ran = [words for words in LINES if words[0] == "cohort" and not SLOW & set(words)]
    for words in ran:
        assert as_a_reader(words) == 0, (words, capsys.readouterr())
    assert {words[1] for words in ran} == COMMANDS.keys() - {"denoising", "serve"}
    assert Path("runs/rows/report.html").exists() and Path("runs/config/changes.jsonl").exists()


def test_the_readme_can_be_read_in_one_go():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    first = text.splitlines()[:24]
    assert "make train" in "".join(first) and "| card |" in "".join(first)


# Qwen2.5: width, layers, heads, heads of keys, width of the MLP; the larger ones have a head of their own.
QWEN = {
    "0.5B": (896, 24, 14, 2, 4864),
    "1.5B": (1536, 28, 12, 2, 8960),
    "3B": (2048, 36, 16, 2, 11008),
    "7B": (3584, 28, 28, 4, 18944),
    "14B": (5120, 48, 40, 8, 13824),
    "32B": (5120, 64, 40, 8, 27648),
}
USABLE = {"24 GB": 23.5, "48 GB": 44.4, "80 GB": 79.1, "141 GB": 139.8}  # GiB that CUDA shows


def test_the_largest_models_that_fit_are_those_of_the_plan(tmp_path, capsys):
    rows = re.findall(r"^\| (\d+ GB) \| (\S+) \| (\S+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [card for card, *_ in rows] == list(USABLE)
    names = list(QWEN)
    for name, (width, layers, heads, key_heads, inner) in QWEN.items():
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": inner}
        more = {"num_attention_heads": heads, "num_key_value_heads": key_heads, "vocab_size": 151936}
        tied = names.index(name) < names.index("7B")
        Qwen2Config(**sizes, **more, tie_word_embeddings=tied).save_pretrained(tmp_path / name)
    for card, *largest in rows:
        for name, more in zip(largest, ([], ["model.lora.r=16"]), strict=True):
            for size, code in ((name, 0), (names[names.index(name) + 1], 1)):
                words = ["recipes/configs/gsm8k_r1.yaml", f"model.name={tmp_path / size}", *more]
                assert cohort(["plan", *words, "--gpu-gib", str(USABLE[card])]) == code, (card, size, more)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings: lower case, hyphens for spaces, no other signs."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


FOLDERS = ("", "recipes/", "recipes/*/", "rewards/*/", "rollout/*/", "rl/*/")
PAGES = [str(page.relative_to(ROOT)) for folder in FOLDERS for page in ROOT.glob(f"{folder}*.md")]


@pytest.mark.parametrize("page", PAGES)
def test_the_links_and_quoted_files_of_a_page_exist(page):
    assert len(PAGES) > 8
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for name in re.findall(r"`((?:recipes|rewards|rl|rollout|tests)/[\w/]+\.(?:md|py|yaml))`", text):
        assert (ROOT / name).exists(), name
