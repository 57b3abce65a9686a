"""A weight sync of several processes: a fault on one of them ends all of them, by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny_llama import make_model, save

from tests.diffusion.processes import launch

SCRIPT = Path(__file__).with_name("two_syncs.py")
SEVENTH = "model.layers.0.mlp.up_proj.weight"  # after the embedding, q, k, v, o and gate


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Case -> how its sync ended on both ranks."""
    out = tmp_path_factory.mktemp("syncs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(SCRIPT.parents[2]), str(SCRIPT.parent)]))
        launch(SCRIPT, [str(save(make_model(0), out / "model")), str(out)], 2)
    found = [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return {case: [found[0][case], found[1][case]] for case in found[0]}


def test_two_processes_sync_a_collective_stream(ends):
    for end in ends["both_send"]:
        assert (end["error"], end["version"], end["is_unchanged"], end["passes"]) == ("", 5, False, 2)


def test_a_process_that_does_not_send_iterates_along_and_adopts_the_version(ends):
    sender, follower = ends["one_sends"]
    assert (sender["error"], sender["version"], sender["is_unchanged"]) == ("", 5, False)
    assert (follower["error"], follower["version"]) == ("", 5)
    assert follower["is_unchanged"] and follower["passes"] == 2


def test_a_process_that_does_not_send_compares_the_canary_of_what_it_samples_from(ends):
    errors = {end["error"] for end in ends["one_sends_and_the_other_has_another_server"]}
    assert len(errors) == 1
    assert errors.pop().startswith("process 1 of 2: engine transformers holds version 5 but computes diff")


@pytest.mark.parametrize("case", ["first_breaks_off", "only_sender_breaks_off"])
def test_an_engine_that_breaks_off_ends_both_processes_with_the_tensors_name(ends, case):
    for end in ends[case]:
        assert end["error"] == (
            f"process 0 of 2: version 5 was not loaded: engine transformers broke off at {SEVENTH}: "
            "RuntimeError: no memory is left"
        )
        assert end["seconds"] < 60 and end["passes"] == 2
    first, second = ends[case]
    assert first["version"] == -1
    assert second["version"] == (5 if case == "first_breaks_off" else 0)


@pytest.mark.parametrize("case", ["second_computes_otherwise", "second_computes_otherwise_later"])
def test_an_engine_that_computes_otherwise_on_one_process_ends_both(ends, case):
    errors = {end["error"] for end in ends[case]}
    assert len(errors) == 1
    assert errors.pop().startswith(
        "process 1 of 2: engine transformers holds version 5 but computes differently: the canary's "
        "log-probs are 1 nats from the policy's"
    )


def test_weights_that_are_not_finite_leave_the_engines_of_both_processes_as_they_were(ends):
    """The inf of one process reaches both, since the stream adds them up."""
    sentence = "version 5 is not sent: model.norm.weight not finite; the engine keeps 0"
    for end in ends["not_finite_on_the_second"]:
        assert end["error"] == f"process 0 of 2: {sentence}; process 1 of 2: {sentence}"
        assert (end["version"], end["is_unchanged"], end["passes"]) == (0, True, 1)
