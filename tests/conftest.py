"""A tiny real model and tokenizer, made once per session, and groups of ragged lengths."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: on a busy machine spinning threads starve
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests import shapes

for asserting in ("scoring", "invariants.resume_laws", "invariants.two_processes"):
    pytest.register_assert_rewrite(f"tests.{asserting}")
SHAPES = shapes.install()


def pytest_report_header() -> str:
    return SHAPES


ROTATED = Path(__file__).with_name("rotated.txt")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out slow tests, except part k of n with COHORT_ROTATION=k/n (0/1: all), and those given by name.

    Lines of rotated.txt are dealt first, then marked tests. Files of the part begin first, so that no process
    waits for a long one at the end.
    """
    if any("::" in argument for argument in config.args):
        return
    lines = [x for x in ROTATED.read_text(encoding="utf-8").splitlines() if x[:1] not in ("", "#")]
    units = {item: unit for item in items if (unit := rotation_unit(item, lines))}
    k, _, n = os.environ.get("COHORT_ROTATION", "").partition("/")
    part = dealt([*lines, *units.values()], int(n)) if n else {}
    now = {item for item, unit in units.items() if n and part[unit] == int(k) % int(n)}
    config.hook.pytest_deselected(items=[item for item in units if item not in now])
    first = {item.path for item in now}
    items[:] = sorted((x for x in items if x in now or x not in units), key=lambda x: x.path not in first)


def dealt(units: Sequence[str], n: int) -> dict[str, int]:
    """The part of each: 0 to n - 1 and back (0 1 2 2 1 0 0 ...), so that parts of a sorted list are even."""
    rounds = [*range(n), *reversed(range(n))]
    return {unit: rounds[i % (2 * n)] for i, unit in enumerate(dict.fromkeys(units))}


def rotation_unit(item: pytest.Item, lines: list[str]) -> str | None:
    """What a slow test is dealt with: all that a line names, all whose mark has the same name, or itself."""
    if line := next((line for line in lines if item.nodeid.startswith(line)), None):
        return line
    mark = item.get_closest_marker("rotation")
    return mark and (f"{item.nodeid.partition('::')[0]} {mark.args[0]}" if mark.args else item.nodeid)


def selected(request: pytest.FixtureRequest, parameter: str) -> list:
    """Values of a parameter in the tests of this file that will run, each once, in order."""
    items = [item for item in request.session.items if item.path == request.path]
    found = [item.callspec.params.get(parameter) for item in items if hasattr(item, "callspec")]
    return [value for value in dict.fromkeys(found) if value is not None]


WORDS = [f"w{i}" for i in range(80)] + list("0123456789+-=.?") + ["\\boxed{", "}", "What", "is", "the"]
SPECIAL = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_tiny_tokenizer(folder: Path):
    return word_tokenizer(folder, [*SPECIAL, *WORDS])


def word_tokenizer(folder: Path, words: Sequence[str]):
    """Words as ids in this order, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer Llama (hidden 32, grouped-query heads) with a word-level tokenizer, in Hugging Face form."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = make_tiny_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_rng_state(generator_state)
    return folder


@pytest.fixture(scope="session")
def other_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same form and tokenizer with other weights, such as a teacher has."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("other") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ragged_groups() -> Callable[..., tuple[list, list]]:
    """(scored groups, advantages) with prompts of 1 to 9 and completions of 1 to 20 tokens, some advantages
    0.
    """
    from rl.types import Completion, Group, Prompt, Reward, ScoredGroup, VersionSpan

    def make(
        num_groups: int = 6,
        group_size: int = 4,
        *,
        seed: int = 0,
        vocabulary: int = 100,
        max_length: int = 20,
    ) -> tuple[list, list]:
        draw = random.Random(seed)
        groups, advantages = [], []
        for p in range(num_groups):
            prompt = Prompt(
                f"p{p}", "", tuple(draw.randrange(5, vocabulary) for _ in range(draw.randint(1, 9)))
            )
            completions = []
            for _ in range(group_size):
                n = draw.randint(1, max_length)
                ids = [draw.randrange(5, vocabulary) for _ in range(n)]
                logprobs = [-4.5 + draw.gauss(0, 0.3) for _ in range(n)]
                reason = "length" if n == max_length else "stop"
                completions.append(Completion(ids, logprobs, [True] * n, reason, [VersionSpan(0, n)]))
            groups.append(
                ScoredGroup(Group(prompt, completions), [Reward(draw.random()) for _ in completions])
            )
            advantages.append([0.0 if draw.random() < 0.25 else draw.gauss(0, 1) for _ in completions])
        return groups, advantages

    return make


@pytest.fixture(scope="session")
def gradients() -> Callable[..., dict[str, torch.Tensor]]:
    """The gradient that one update would step along, by parameter name (the optimizer only records it)."""
    from rl.batch import pack
    from rl.update import pack_rules, update_policy
    from tests.scoring import alone

    class Recorder(torch.optim.SGD):
        recorded: dict[int, torch.Tensor]

        def step(self, closure=None):  # type: ignore[override]
            self.recorded = {
                id(p): p.grad.clone() for g in self.param_groups for p in g["params"] if p.grad is not None
            }

    def compute(
        policy, config, groups: Sequence, advantages: Sequence, reference=None, teacher=None
    ) -> dict[str, torch.Tensor]:
        named = policy.trainable()
        optimizer = Recorder([p for _, p in named], lr=0.0)
        rules = pack_rules(config, share_prompts=policy.shares_prompts)
        batches = pack(groups, advantages, rules)
        update_policy(
            policy,
            optimizer,
            batches,
            config.loss,
            world=alone(policy),
            reference=reference,
            teacher=teacher,
            max_grad_norm=1e9,
        )
        return {name: optimizer.recorded[id(p)] for name, p in named if id(p) in optimizer.recorded}

    return compute
