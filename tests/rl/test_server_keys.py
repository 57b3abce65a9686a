"""Keys of `engine` for servers: what belongs together, and what the server decides."""

from __future__ import annotations

import re
from typing import Any

import pytest

from rl.config import Config
from rl.config.read import load_config, replaced
from rl.store.folder import claim_config, run_name


@pytest.mark.parametrize(
    ("engine", "fault"),
    [
        ({"name": "server"}, "needs engine.urls"),
        ({"urls": ["http://127.0.0.1:8000"]}, "engine.urls does nothing under engine.name=auto"),
        ({"weights_url": "http://a:1"}, "engine.weights_url does nothing under engine.name=auto"),
        (
            {"name": "server", "urls": ["http://a:1", "http://a:1/"], "token_file": "t"},
            "names a server twice",
        ),
        (
            {"name": "server", "urls": ["http://a:1"], "token_file": "t", "process": "own"},
            "engine.process=own: under engine.name=server the server decides that",
        ),
        (
            {"name": "server", "urls": ["http://a:1"], "token_file": "t"}
            | {"weights_url": "nccl://a:1", "weights_folder": "w"},
            "engine.weights_folder does nothing if engine.weights_url=nccl",
        ),
        ({"name": "server", "urls": ["http://me:pw@a:1"], "token_file": "t"}, "should match pattern"),
        ({"name": "server", "urls": ["http://a:80a"], "token_file": "t"}, "should match pattern"),
        ({"name": "server", "urls": ["http://a b:80"], "token_file": "t"}, "should match pattern"),
    ],
)
def test_keys_that_do_nothing_are_refused(engine: dict[str, Any], fault: str):
    with pytest.raises(ValueError, match=fault):
        Config.model_validate({"engine": engine})


def test_a_server_may_have_a_host_of_any_kind():
    urls = ["http://127.0.0.1:8000/", "https://gpu-7.example.org", "http://[::1]:8000", "http://node_1:80"]
    engine = {"name": "server", "urls": urls, "token_file": "token"}
    assert Config.model_validate({"engine": engine}).engine.urls == urls


def test_what_is_planned_for_a_card_may_be_set_under_servers():
    engine = {"name": "server", "urls": ["http://127.0.0.1:8000"], "token_file": "token"}
    config = Config.model_validate({"engine": engine})
    assert (
        replaced(config, {"engine.max_num_seqs": 64, "train.token_budget": 4096}).engine.urls
        == engine["urls"]
    )


def test_a_run_keeps_its_name_and_another_folder_of_the_same_path_has_another(tmp_path):
    """Servers know a run by it: two containers may have folders of their own under one path."""
    config = load_config(None, [f"run_dir={tmp_path / 'run'}"])
    claim_config(config)
    name = run_name(config.run_dir)
    assert re.fullmatch(rf"the run in {tmp_path}/run \([0-9a-f]{{16}}\)", name)
    claim_config(config)  # it resumes
    assert run_name(config.run_dir) == name
    config.run_dir.rename(tmp_path / "away")
    claim_config(config)
    assert run_name(config.run_dir) != name
