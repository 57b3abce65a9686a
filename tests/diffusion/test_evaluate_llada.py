"""The evaluation recipe as a user meets it: files in, the library's own numbers out.

The test of --lm-eval is skipped without lm-eval; how to install it: tests/diffusion/test_likelihood.py.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from recipes.evaluate_llada import main
from recipes.llada import main as train
from rl.config.diffusion import DiffusionConfig, EosConfig, TextConfig
from rl.diffusion.likelihood import bound, bound_log, choose, log_likelihoods
from rl.diffusion.model import DiffusionScorer, load_diffusion_model
from rl.diffusion.objectives import Example, step_generator
from rl.diffusion.text import encode_rows, padded_examples
from rl.store.metrics import wilson_interval
from rollout.diffusion.denoise import denoise, prompt_canvas
from rollout.diffusion.model import TransformersDenoiser
from rollout.diffusion.steps import DenoisingParams
from rollout.sampler import completion_seed
from tests.diffusion.lm_eval_tasks import write_lm_eval_tasks

MASK = 2  # <unk>


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def scorer(tiny_model_dir) -> DiffusionScorer:
    return DiffusionScorer(load_diffusion_model(str(tiny_model_dir), mask_token_id=MASK))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(model: Path, *options: object) -> int:
    return main([str(model), "--mask-token", "<unk>", *map(str, options)])


@pytest.mark.parametrize("kind", ["text", "pairs", "chats"])
def test_perplexity_is_that_of_the_bound(tiny_model_dir, scorer, tokenizer, tmp_path, capsys, kind):
    rows = [{"prompt": f"What is w{i}", "completion": f"w{i} w{i + 1} w5"} for i in range(9)]
    if kind == "text":
        rows = [{"text": f"w{i} w{i + 1} is the w3"} for i in range(9)]
    file = write(tmp_path / "rows.jsonl", rows)
    chat = "--chat" if kind == "chats" else "--no-chat"
    assert evaluate(tiny_model_dir, "--perplexity", file, "--max-length", 7, "--seed", 3, chat) == 0
    config = TextConfig(source=str(file), max_length=7 if kind == "text" else 99, chat=kind == "chats")
    encoded, _ = encode_rows(rows, config, tokenizer)
    examples = padded_examples(encoded, EosConfig(policy="single"), [])
    expected = bound(scorer, examples, step_generator(3), mask_token_id=MASK, num_draws=4)
    # 9 texts of 5 words and an end each, cut every 7 tokens; or 3 words and an end, of each of 9 answers.
    sizes = (54, 8) if kind == "text" else (36, 9)
    assert (expected.num_tokens, expected.num_examples) == sizes
    assert f"perplexity of {file}: {expected}\n" in capsys.readouterr().out


def test_a_text_of_one_piece_says_that_it_has_no_error(tiny_model_dir, tmp_path, capsys):
    file = write(tmp_path / "rows.jsonl", [{"text": "w1 w2"}])
    assert evaluate(tiny_model_dir, "--perplexity", file) == 0
    assert "a single example has no standard error" in capsys.readouterr().out


def test_choices_are_those_of_the_log_likelihoods(tiny_model_dir, scorer, tokenizer, tmp_path, capsys):
    rows = [
        {"prompt": f"What is w{i}", "choices": ["w1", "w2 w3 w4", "w5 w6"], "answer": i // 8}
        for i in range(12)
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    options = ("--choices", file, "--no-chat", "--num-draws", 8, "--seed", 4)
    assert evaluate(tiny_model_dir, *options) == 0
    ids = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    examples = []
    for row in rows:
        prompt = ids(row["prompt"])
        for choice in row["choices"]:
            both = torch.tensor(prompt + ids(choice))
            examples.append(Example(both, torch.arange(len(both)) >= len(prompt)))
    found = log_likelihoods(scorer, examples, mask_token_id=MASK, num_draws=8, seed=4).view(12, 3).tolist()
    lengths = [2, 8, 5]  # characters
    plain = sum(choose(v) == row["answer"] for v, row in zip(found, rows, strict=True))
    normed = sum(choose(v, lengths) == row["answer"] for v, row in zip(found, rows, strict=True))
    assert plain != normed
    out = capsys.readouterr().out
    for label, right in (("", plain), (", per character", normed)):
        low, high = wilson_interval(right, 12)
        wanted = f"{right / 12:.1%} right (95 % interval {low:.1%} to {high:.1%}, n = 12)"
        assert f"choices of {file}{label}: {wanted}\n" in out


def test_generation_is_that_of_the_sampler(tiny_model_dir, scorer, tokenizer, tmp_path, capsys):
    """Ragged prompts; without answers nothing is graded."""
    rows = [{"prompt": "What is " + "w3 " * i + f"w{i}"} for i in range(6)]
    file = write(tmp_path / "rows.jsonl", rows)
    options = ("--no-chat", "--gen-length", 12, "--block-length", 4, "--steps", 6, "--temperature", 0.7)
    assert evaluate(tiny_model_dir, "--generate", file, *options, "--show", 6, "--seed", 9) == 0
    out = capsys.readouterr().out
    params = DenoisingParams(12, block_length=4, steps=6, temperature=0.7, stop_token_ids=(1,))
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    found = denoise(
        TransformersDenoiser(scorer.model),
        [prompt_canvas(ids, params, MASK) for ids in prompts],
        params,
        seeds=[completion_seed(completion_seed(9, i), 0) for i in range(6)],
    )
    for row, prompt, done in zip(rows, prompts, found, strict=True):
        assert done is not None
        text = tokenizer.decode(done.token_ids[len(prompt) : done.end], skip_special_tokens=True)
        assert f"\n{row['prompt']}{text}\n" in out
    assert "right" not in out


def test_generation_is_graded_where_a_row_has_an_answer(digit_model_dir, tmp_path, capsys):
    """The model writes 7 whatever it is asked: 3 of 4 answers are 7, and one row has none."""
    answers = ["7", "8", "7", "7.0", None]
    rows = [{"prompt": f"What is w{i}", "answer": answer} for i, answer in enumerate(answers)]
    file = write(tmp_path / "rows.jsonl", rows)
    assert evaluate(digit_model_dir, "--generate", file, "--gen-length", 1, "--block-length", 1) == 0
    low, high = wilson_interval(3, 4)
    wanted = f"generation of {file}: 75.0% right (95 % interval {low:.1%} to {high:.1%}, n = 4)"
    assert wanted in capsys.readouterr().out


@pytest.fixture(scope="module")
def digit_model_dir(tiny_model_dir, tokenizer, tmp_path_factory) -> Path:
    """All hidden states are nearly one vector, along which 7 has the longest embedding (the head)."""
    model = load_diffusion_model(str(tiny_model_dir), mask_token_id=MASK)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.mul_(1e-3)[:, 0] = 1.0
        embedding[tokenizer.convert_tokens_to_ids("7"), 0] = 9.0
        for layer in model.base_model.layers:
            layer.self_attn.o_proj.weight.mul_(1e-3)
            layer.mlp.down_proj.weight.mul_(1e-3)
    folder = tmp_path_factory.mktemp("digit")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [False, True])
def test_what_recipes_llada_saved_has_the_bound_of_its_run(tiny_model_dir, tmp_path, capsys, lora):
    """The mask token comes from the checkpoint; an adapter is merged into its base model."""
    rows = [{"prompt": f"What is w{i}", "completion": f"w{i} w{i + 1}"} for i in range(8)]
    file, run_dir = write(tmp_path / "rows.jsonl", rows), tmp_path / "run"
    data = {"source": str(file), "max_length": 32}
    config = DiffusionConfig.model_validate(
        {
            "run_dir": run_dir,
            "model": {"name": str(tiny_model_dir), "dtype": "fp32", "mask_token": "<unk>"},
            "data": data,
            "train": {"steps": 3, "examples_per_step": 4},
            "optimizer": {"lr": 3e-2, "warmup_steps": 0},
            "evaluation": {"data": data, "num_draws": 64},
            "checkpoint": {"every": 3},
        }
    )
    if lora:
        config = config.model_copy(
            update={"model": config.model.model_validate({**config.model.model_dump(), "lora": {"r": 4}})}
        )
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    assert train([str(path)]) == 0
    before, after = bound_log(run_dir).read().values()
    capsys.readouterr()
    folder = run_dir / "checkpoints" / "step-000003"
    assert (folder / "adapter_config.json").exists() == lora
    assert main([str(folder), "--perplexity", str(file), "--num-draws", "512"]) == 0
    found = float(re.findall(r"at most ([0-9.]+) \+-", capsys.readouterr().out)[0])
    assert math.isclose(found, after.nats_per_token, rel_tol=0.02)
    assert not math.isclose(before.nats_per_token, after.nats_per_token, rel_tol=0.1)


def test_lm_eval_tasks_get_the_sampler_and_print_their_table(digit_model_dir, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    pytest.importorskip("sacrebleu")
    rows = write_lm_eval_tasks(tmp_path)
    task = tmp_path / "samples.yaml"
    task.write_text(task.read_text().replace("w[0-9]+", "[0-9]").replace("wanted", '"7"'))
    options = ("--gen-length", 4, "--block-length", 2, "--num-draws", 8, "--lm-eval-path", tmp_path)
    assert evaluate(digit_model_dir, "--lm-eval", "tiny_choices,tiny_samples", *options) == 0
    out = capsys.readouterr().out
    table = {line.split("|")[1].strip(): line.split("|") for line in out.splitlines() if "tiny_" in line}
    # A constant model prefers the shorter choice, which is always the second: half of the answers.
    assert len(rows) == 8 and float(table["tiny_choices"][7]) == 0.5
    assert float(table["tiny_samples"][7]) == 1.0
    assert evaluate(digit_model_dir, "--lm-eval", "tiny_choicer", "--lm-eval-path", tmp_path) == 1
    assert "there is no task 'tiny_choicer'; near names: tiny_choices" in capsys.readouterr().err


LONG = "w1 " * 600


@pytest.mark.parametrize(
    ("option", "row", "said"),
    [
        ("--perplexity", {"prompt": "w1", "completion": LONG}, "has 602 tokens, but the model has 512 posi"),
        (
            "--choices",
            {"prompt": LONG, "choices": ["w1"], "answer": 0},
            "row 1 has 601 tokens, but the model",
        ),
        ("--choices", {"prompt": "w1", "choices": ["<unk>"], "answer": 0}, "row 1 contains the mask token"),
        (
            "--choices",
            {"prompt": "w1", "choices": ["w1", ""], "answer": 0},
            "must be a list of texts that are",
        ),
        ("--choices", {"prompt": "w1", "choices": ["w1"], "answer": 1}, "'answer' is 1; give the index of"),
        (
            "--generate",
            {"prompt": "w1 " * 500},
            "row 1 has 500 tokens and --gen-length 128 more, but the model",
        ),
        ("--generate", {"prompt": "w1 <unk>"}, "row 1 contains the mask token (id 2)"),
    ],
)
def test_rows_that_do_not_fit_are_named(tiny_model_dir, tmp_path, capsys, option, row, said):
    good = {"prompt": "w1", "completion": "w2", "choices": ["w2"], "answer": 0}
    file = write(tmp_path / "rows.jsonl", [{k: good[k] for k in row}, row])
    assert evaluate(tiny_model_dir, option, file, "--no-chat") == 1
    assert said in capsys.readouterr().err


def test_faults_of_the_command_line_are_sentences(tiny_model_dir, tmp_path, capsys):
    assert evaluate(tiny_model_dir, "--perplexity", tmp_path / "none.jsonl") == 1
    assert "none.jsonl is not a file; give one of JSON lines" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), "--perplexity", str(tmp_path)]) == 1
    assert "none" in capsys.readouterr().err
    for options in ([], ["--perplexity", "x", "--num-draws", "0"]):
        with pytest.raises(SystemExit):
            evaluate(tiny_model_dir, *options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--gen-length", "100"],
            "--gen-length=100 is not divisible by --block-length=32; use --gen-len",
        ),
        (["--block-length", "48"], "use --gen-length=96 or 144, or --block-length in [1, 2, 4, 8"),
        (
            ["--steps", "6"],
            "--steps=6 do not divide over the 4 blocks of --gen-length=128 and --block",
        ),
        (["--threshold", "1.5"], "--threshold=1.5 is a probability"),
        (["--threshold", "nan"], "--threshold=nan is a probability"),
        (["--temperature", "-1"], "--temperature=-1.0 must be finite and must not be negative"),
        (["--temperature", "nan"], "--temperature=nan must be finite"),
        (["--cfg-scale", "-0.5"], "--cfg-scale=-0.5 must be finite and must not be negative"),
        (["--cfg-scale", "inf"], "--cfg-scale=inf must be finite"),
        (["--choices", "none.jsonl"], "none.jsonl is not a file; give one of JSON lines"),
        (["--generate", "none.jsonl"], "none.jsonl is not a file"),
        (["--lm-eval", "x", "--lm-eval-path", "nowhere"], "--lm-eval-path nowhere is not a folder"),
    ],
)
def test_options_and_files_are_checked_before_the_model_is_loaded(tmp_path, capsys, options, said):
    """It has no weights: what is said of them would come first."""
    file, bare = write(tmp_path / "rows.jsonl", [{"text": "w1"}]), tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text('{"model_type": "llama"}')
    assert evaluate(bare, "--perplexity", file, *options) == 1
    captured = capsys.readouterr()
    assert said in captured.err and str(bare) not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("option", "row", "said"),
    [
        ("--choices", {"prompt": "w1", "choices": ["<unk>"], "answer": 0}, "row 0 contains the mask token"),
        ("--generate", {"prompt": "w1 <unk>"}, "row 0 contains the mask token"),
        (
            "--generate",
            {"prompt": "w1 " * 500},
            "row 0 has 500 tokens and --gen-length 128 more, but the",
        ),
    ],
)
def test_rows_are_checked_before_anything_is_computed(tiny_model_dir, tmp_path, capsys, option, row, said):
    text = write(tmp_path / "text.jsonl", [{"text": "w1 w2"}])
    file = write(tmp_path / "rows.jsonl", [row])
    assert evaluate(tiny_model_dir, "--perplexity", text, option, file, "--no-chat") == 1
    captured = capsys.readouterr()
    assert said in captured.err
    assert "perplexity of" not in captured.out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--mask-token", "<mask>"], "--mask-token='<mask>' is not in the vocabulary; special tokens are"),
        (["--mask-token", ""], "--mask-token='' is not in the vocabulary"),
        (["--mask-token", "99999"], "--mask-token 99999 is not one of the model's 105 vocabulary rows"),
        (["--mask-token", "-4"], "--mask-token='-4' is not in the vocabulary"),
        (["--mask-token", "<eos>"], "--mask-token 1 is also the end-of-text token"),
        (["--mask-token", "w1"], "choose a token that your text never uses (--mask-token)"),
        ([], "and no token whose name says that it is spare; set --mask-token to a special token"),
    ],
)
def test_faults_name_options_and_no_keys_of_a_config(tiny_model_dir, tmp_path, capsys, options, said):
    file = write(tmp_path / "rows.jsonl", [{"text": "w1 w2"}])
    assert main([str(tiny_model_dir), "--perplexity", str(file), *options]) == 1
    error = capsys.readouterr().err
    assert said in error and "model." not in error.replace(str(tiny_model_dir), "")
    assert main([str(tmp_path / "none"), "--perplexity", str(file)]) == 1
    error = capsys.readouterr().err
    assert f"model '{tmp_path / 'none'}': there is no such folder" in error and "model." not in error


SAMPLING = {
    "threshold": (["--threshold", 0.04], {"threshold": 0.04}),
    "guidance": (["--cfg-scale", 1.5], {"cfg_scale": 1.5}),
    "cache": (["--cache", "dual", "--refresh-every", 2], {"cache": "dual", "refresh_every": 2}),
    "order": (["--remasking", "entropy"], {"remasking": "entropy"}),
}


@pytest.mark.parametrize("name", SAMPLING)
def test_the_sampler_s_options_are_its_own(tiny_model_dir, scorer, tokenizer, tmp_path, capsys, name):
    options, settings = SAMPLING[name]
    rows = [{"prompt": f"What is w{i} w{2 * i}"} for i in range(6)]
    file = write(tmp_path / "rows.jsonl", rows)
    lengths = ("--no-chat", "--gen-length", 12, "--block-length", 6, "--show", 6)
    shown = []
    for chosen in (lengths, (*lengths, *options)):
        assert evaluate(tiny_model_dir, "--generate", file, *chosen) == 0
        shown.append(capsys.readouterr().out)
    params = DenoisingParams(12, block_length=6, stop_token_ids=(1,), **settings)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    found = denoise(
        TransformersDenoiser(scorer.model),
        [prompt_canvas(ids, params, MASK) for ids in prompts],
        params,
        seeds=[0] * 6,  # greedy
    )
    assert shown[0] != shown[1]
    for row, prompt, done in zip(rows, prompts, found, strict=True):
        assert done is not None
        text = tokenizer.decode(done.token_ids[len(prompt) : done.end], skip_special_tokens=True)
        assert f"\n{row['prompt']}{text}\n" in shown[1]


def test_the_shift_is_an_option(tiny_model_dir, tmp_path, capsys):
    """It holds for a causal model's folder that says nothing, and against a checkpoint that says more."""
    file = write(tmp_path / "rows.jsonl", [{"text": "w1 w2 w3 w4"}])
    outs = []
    for flags in ([], ["--no-shift"], ["--shift"]):
        assert evaluate(tiny_model_dir, "--perplexity", file, *flags) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]
    model = load_diffusion_model(str(tiny_model_dir), mask_token_id=MASK, shift=True)
    model.save_pretrained(tmp_path / "shifted")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "shifted")
    assert main([str(tmp_path / "shifted"), "--perplexity", str(file)]) == 0
    assert capsys.readouterr().out.replace(str(tmp_path / "shifted"), str(tiny_model_dir)) == outs[2]
    assert main([str(tmp_path / "shifted"), "--perplexity", str(file), "--no-shift"]) == 0
    assert capsys.readouterr().out.startswith(
        "--no-shift: the checkpoint says shift, and the option counts\n"
    )
