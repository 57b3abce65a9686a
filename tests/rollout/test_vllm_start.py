"""Starting vLLM: versions that fit, distributed trainers, and a process group that survives the engine."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_llama import make_model, make_tokenizer, save

from recipes.engines import start_parts
from rollout.vllm.internals import version_conflict
from rollout.vllm.settings import CoreSettings, _on_gpu
from tests.vllm_engines import needs_vllm, start_vllm

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(make_model(0), tmp_path_factory.mktemp("model"))


def on_gpu(share, max_model_len, max_num_seqs, *, eager):
    settings = CoreSettings("m", torch.bfloat16, max_model_len, max_num_seqs=max_num_seqs)
    return _on_gpu(replace(settings, gpu_memory_utilization=share), eager)


@pytest.mark.parametrize(
    ("version", "torch_version", "reason"),
    [
        ("0.32.0", "2.13.0+cpu", None),
        ("0.25.1", "2.13.0", None),
        ("0.25.0", "2.13.0", r"outside the tested range >=0.25.1,<0.33; pip install 'vllm>=0.25.1,<0.33'"),
        ("0.33.0", "2.13.0", "outside the tested range"),
        (
            "0.32.0",
            "2.12.0+cu130",
            "built for torch 2.13.0, but torch 2.12.0+cu130 is installed; pip install torch==",
        ),
    ],
)
def test_a_vllm_that_does_not_fit_is_explained(version, torch_version, reason):
    requires = ["torch==2.13.0+cpu; python_version >= '3'", "torch==1.0; python_version < '3'", "torchvision"]
    found = version_conflict("vllm", version, requires, torch_version=torch_version)
    assert found is None if reason is None else reason in (found or "")


def test_checkpoints_of_one_architecture_share_what_vllm_compiles(folder, tmp_path):
    """vLLM's own key names the checkpoint's folder, so that each stage of a pipeline would compile anew."""
    from vllm import EngineArgs

    import rollout.vllm.worker  # noqa: F401  as vLLM's worker imports it

    def key(folder, *, length=128):
        arguments = EngineArgs(
            model=str(folder), skip_tokenizer_init=True, max_model_len=length, dtype="float32"
        )
        return arguments.create_engine_config().compute_hash()

    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    # What SFT and GRPO change in the config of a model that they have trained.
    config |= {"eos_token_id": 1, "pad_token_id": 2, "dtype": "bfloat16", "use_cache": False}
    (copy / "config.json").write_text(json.dumps(config))
    assert key(folder) == key(copy) == key(copy, length=96)
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert key(copy) != key(folder)


def test_families_whose_code_may_differ_keep_the_whole_key(folder, tmp_path):
    """Llama 4 tunes its attention's temperature beyond 32,768 tokens, or as generation_config.json says."""
    from transformers import Llama4TextConfig
    from vllm import EngineArgs

    import rollout.vllm.worker  # noqa: F401  as vLLM's worker imports it

    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 64, "intermediate_size_mlp": 64}
    config = Llama4TextConfig(**sizes, num_local_experts=2, max_position_embeddings=65_536)
    config.architectures = ["Llama4ForCausalLM"]
    config.save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")

    def key(name, length):
        own = {"skip_tokenizer_init": True, "max_model_len": length, "dtype": "float32"}
        return EngineArgs(model=str(tmp_path / name), **own).create_engine_config().compute_hash()

    assert len({key("one", 128), key("one", 40_000), key("two", 128)}) == 3


def test_code_of_the_other_families_reads_nothing_that_the_key_leaves_out():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry

    from rollout.vllm.worker import _ALIKE, _OF_NO_CODE

    named = "|".join(name for name in _OF_NO_CODE if name != "dtype")
    reads = re.compile(rf"max_model_len|generation_config|sleep_mode|[^_]config\.(torch_)?dtype|{named}")
    for model_type in _ALIKE:
        module = ModelRegistry.models[MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]].module_name
        source = Path(importlib.util.find_spec(module).origin).read_text()
        assert (found := reads.search(source)) is None, (model_type, found)


def test_a_share_of_the_gpu_that_is_not_free_is_refused_with_one_that_fits(monkeypatch):
    """30.4 of 80 GiB are free; 1 GiB of them goes to a process's own context: 29.4 / 80 = 0.3675."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(30.4 * 2**30), 80 << 30))
    with pytest.raises(ValueError, match=r"=0\.5 of 80 GiB is more than the 30\.4 GiB .* use at most 0\.36"):
        on_gpu(0.5, 1224, 256, eager=False)
    for number, graphs in ((64, 128), (256, 512), (700, 700), (3000, 1024)):
        arguments = on_gpu(0.3, 1224, number, eager=False)
        assert arguments["max_cudagraph_capture_size"] == graphs
    eager = on_gpu(0.3, 20000, 64, eager=True)
    sleeps = eager.pop("enable_sleep_mode")
    assert eager == {"gpu_memory_utilization": 0.3, "max_num_batched_tokens": 20000} and sleeps is False


RANK_PROGRAM = """
    import sys
    import torch, torch.distributed as dist
    from tiny_llama import Stream, make_model, make_prompts, make_tokenizer
    from rl.types import Call, SamplingParams
    from tests.vllm_engines import start_vllm
    from rollout.weight_sync import publish

    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/store", rank=rank, world_size=2)
    engine = start_vllm(sys.argv[3], make_tokenizer(), dtype=torch.float32, max_model_len=128, max_num_seqs=8,
                        kv_cache_gib=0.03, timeout_s=90)
    publish(engine, Stream(make_model(1)), version=1, tolerance=1e-4)
    # Ranks sample different amounts: no step of one engine may wait for the other.
    for _ in range(1 + 2 * rank):
        engine.generate(Call(tuple(make_prompts(4)), 2, SamplingParams(4 + rank), (1,)))
    engine.close()
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    print("sum over ranks", total.item(), "world", dist.get_world_size())
    dist.destroy_process_group()
"""


LATE_PROGRAM = """
    import sys, time
    import torch.distributed as dist
    from rollout.engine import EngineError
    from rollout.vllm.start import _meet

    rank = int(sys.argv[1])
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/store", rank=rank, world_size=2)
    if rank == 1:
        time.sleep(3)
    else:
        try:
            _meet(1.0)
        except EngineError as error:
            print(error)
"""


def run_two_ranks(program, *arguments):
    """The outputs of two processes that run `program` with their rank and the arguments."""
    folders = (Path(__file__).parents[2], Path(__file__).parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(program), str(rank), *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        return [p.communicate(timeout=270)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()


@pytest.mark.slow
def test_two_gloo_processes_have_an_engine_each_and_keep_their_process_group(folder, tmp_path):
    for output in run_two_ranks(RANK_PROGRAM, tmp_path, folder):
        assert "sum over ranks 3.0 world 2" in output, output[-3000:]


@pytest.mark.slow
def test_a_process_that_does_not_come_to_the_start_is_named(tmp_path):
    output = run_two_ranks(LATE_PROGRAM, tmp_path)[0]
    assert "not every process reached the start of its vLLM engine within timeout_s=1:" in output
    assert "ank 1" in output, output[-3000:]


def test_a_distributed_run_without_a_process_group_is_told_the_order(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match=r"WORLD_SIZE=2, .* make the policy \(accelerate\) before the vLLM engine"
    ):
        start_vllm(folder, make_tokenizer(), dtype=torch.float32, max_model_len=128)


def test_the_parts_of_a_start_are_read_from_the_log_of_vllm():
    log = """(EngineCore pid=1548) INFO 11-29 09:49:13 [model_runner.py:302] Model loading took 2.98 GiB and 1.950919 seconds
(EngineCore pid=1548) INFO 11-29 09:49:34 [monitor.py:53] torch.compile took 20.38 s in total
(EngineCore pid=1548) INFO 11-29 09:49:41 [model_runner.py:722] Graph capturing finished in 5 secs, took 0.42 GiB
"""  # noqa: E501
    assert start_parts(log) == {"weights": 1.950919, "compilation": 20.38, "graphs": 5.0}
    assert start_parts("") == {}
