"""A weight sync proves itself: whatever goes wrong between policy and engine is named and stops the run."""

import math
import threading

import pytest
import torch
from sync_faults import DOWN, FAULTS, Q0, dropped, lora_missing, stale, swapped
from tiny_llama import (
    CANARY,
    Stream,
    largest_gap,
    make_model,
    make_prompts,
    make_tokenizer,
    save,
    token_logprobs,
)

from rl.types import SamplingParams
from rollout.engine import EngineError
from rollout.fingerprint import (
    HeldTensor,
    WordHashes,
    compared_part,
    fingerprints,
    mismatches,
    sampled_columns,
)
from rollout.transformers import TransformersEngine
from rollout.weight_sync import WeightSyncError, publish
from tests.calling import call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(make_model(0), tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(folder):
    return TransformersEngine(folder, make_tokenizer())


@pytest.fixture(scope="module")
def policy():
    """Another model than the engine was started from."""
    return make_model(1)


def test_after_a_sync_the_engine_computes_as_the_policy_does(engine, policy):
    ids = list(range(30, 60))
    assert largest_gap(engine.prompt_logprobs(ids), token_logprobs(policy, ids)) > 0.1
    report = publish(engine, Stream(policy), version=7, tolerance=1e-4)
    assert largest_gap(engine.prompt_logprobs(ids), token_logprobs(policy, ids)) < 1e-5
    assert engine.version == 7
    # 2 layers x (q, k, v, o, gate, up, down, 2 norms) + the embedding (which is the head) + the last norm
    assert len(engine.tensors) == 2 * 9 + 2
    # float32: 300 x 64 + 64 + 2 x (64 x 64 x 2 + 32 x 64 x 2 + 3 x 64 x 96 + 2 x 64) numbers
    num_bytes = sum(held.num_bytes for held in engine.tensors.values())
    assert num_bytes == 4 * (19264 + 2 * (8192 + 4096 + 18432 + 128))
    assert not any(held.sampled for held in engine.tensors.values())  # all bytes are compared
    assert 0 <= report.canary_mean_gap <= report.canary_max_gap < 1e-5
    assert all(seconds > 0 for seconds in report.parts.values())
    assert list(report.parts) == ["inspect", "send", "fingerprints", "canary"]
    assert sum(report.parts.values()) == pytest.approx(report.seconds)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_fault_on_the_way_is_caught_by_name(engine, policy, fault):
    """The stream shows the right tensors when inspected and wrong ones when sent."""
    with pytest.raises(WeightSyncError, match="does not hold version 1") as caught:
        publish(engine, Stream(policy, {2: fault}), version=1, tolerance=100.0)
    assert str(caught.value).endswith(": " + ", ".join(FAULTS[fault]))


def test_a_tensor_that_is_missing_from_the_stream_is_refused_before_sending(engine, policy):
    before = engine.fingerprints()
    with pytest.raises(WeightSyncError, match=f"version 1 is not sent: the policy's stream lacks {Q0}$"):
        publish(engine, Stream(policy, {1: dropped}), version=1, tolerance=1.0)
    assert (engine.version, engine.fingerprints()) == (0, before)


@pytest.mark.parametrize("fault", [lora_missing, swapped, stale], ids=lambda f: f.__name__)
def test_a_stream_that_is_wrong_throughout_is_caught_by_the_canary(engine, policy, fault):
    """Fingerprints agree, since both passes are wrong; only the policy's own log-probs tell."""
    with pytest.raises(WeightSyncError, match=r"computes differently: the canary's log-probs are .* nats"):
        publish(engine, Stream(policy, {1: fault, 2: fault}), version=1, tolerance=None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_never_sent(engine, value):
    policy = make_model(1)
    with torch.no_grad():
        policy.get_parameter(DOWN)[3, 5] = value
    before = engine.fingerprints()
    for verify in (True, False):
        with pytest.raises(WeightSyncError, match=f"version 1 is not sent: {DOWN} not finite; .* keeps 0"):
            publish(engine, Stream(policy), version=1, tolerance=1.0, verify=verify)
    assert (engine.version, engine.fingerprints()) == (0, before)


def test_an_engine_that_keeps_its_old_version_is_caught(folder, policy):
    class Forgetful(TransformersEngine):
        def update_weights(self, weights, *, version):
            super().update_weights(weights, version=0)

    engine = Forgetful(folder, make_tokenizer())
    with pytest.raises(WeightSyncError, match="says it holds version 0 after version 1 was sent"):
        publish(engine, Stream(policy), version=1, tolerance=1.0)


def test_another_models_weights_are_refused_with_both_names(engine):
    with pytest.raises(
        WeightSyncError, match=r"sends model.embed_tokens.weight \(310, 64\) and engine transformers"
    ):
        publish(engine, Stream(make_model(1, vocab_size=310)), version=1, tolerance=1.0)
    with pytest.raises(
        WeightSyncError, match=r"sends model\.layers\.2\..* has .* and \d+ more, not this name"
    ):
        publish(engine, Stream(make_model(1, layers=3)), version=1, tolerance=1.0)


def test_a_float32_policy_syncs_to_a_bfloat16_engine_and_one_flipped_bit_is_seen(folder, policy):
    engine = TransformersEngine(folder, make_tokenizer(), dtype=torch.bfloat16)
    publish(engine, Stream(policy), version=1, tolerance=None)
    num_bytes = sum(held.num_bytes for held in engine.tensors.values())
    assert num_bytes == 2 * (19264 + 2 * (8192 + 4096 + 18432 + 128))
    sent = engine.fingerprints()
    weight = engine.model.get_parameter(DOWN)
    weight.view(torch.int16)[3, 5] ^= 1
    assert mismatches(sent, engine.fingerprints()) == [DOWN]


def test_the_canary_tolerance_defaults_to_the_engines_precision(folder, policy):
    """0.0025 nats for float32, 0.2 for bfloat16: a policy that is off by 0.1 passes only the second,
    also where one token is far off, as bf16 has it for unlikely ones.
    """

    class Shifted(Stream):
        def canary(self):
            ids, logprobs = super().canary()
            return ids, [logprobs[0] + 0.4, *(x + 0.1 for x in logprobs[1:])]

    with pytest.raises(WeightSyncError, match=r"more than 0\.0025 and 0\.02 "):
        publish(TransformersEngine(folder, make_tokenizer()), Shifted(policy), version=1, tolerance=None)
    half = TransformersEngine(folder, make_tokenizer(), dtype=torch.bfloat16)
    report = publish(half, Shifted(policy), version=1, tolerance=None)
    assert 0.1 < report.canary_mean_gap < 0.2 < report.canary_max_gap


def test_a_canary_that_is_not_a_number_does_not_pass(engine, policy):
    class Broken(Stream):
        def canary(self):
            return CANARY, [math.nan] * (len(CANARY) - 1)

    with pytest.raises(WeightSyncError, match="are nan nats"):
        publish(engine, Broken(policy), version=1, tolerance=1.0)


def test_an_engine_of_its_own_process_hashes_beside_the_policys_canary(engine, policy, monkeypatch):
    """Each of the two waits here for the other to have begun."""
    hashing, scoring, plain = threading.Event(), threading.Event(), engine.fingerprints

    class Noted(Stream):
        def canary(self):
            scoring.set()
            assert hashing.wait(60)
            return super().canary()

    def answer():
        hashing.set()
        assert scoring.wait(60)
        return plain()

    monkeypatch.setattr(engine, "fingerprints", answer)
    monkeypatch.setattr(engine, "runs_alone", True)
    assert publish(engine, Noted(policy), version=1, tolerance=1e-4).canary_max_gap < 1e-4


@pytest.mark.parametrize("runs_alone", [False, True])
def test_no_fault_of_an_engine_keeps_from_a_canary_of_all(engine, policy, monkeypatch, runs_alone):
    """The others would wait in the collective forward pass for this process."""
    computed = []

    class Noted(Stream):
        def canary(self):
            computed.append(True)
            return super().canary()

    def broken():
        raise EngineError("the core is gone")

    monkeypatch.setattr(engine, "fingerprints", broken)
    monkeypatch.setattr(engine, "runs_alone", runs_alone)
    with pytest.raises(WeightSyncError, match="EngineError: the core is gone"):
        publish(engine, Noted(policy), version=1, tolerance=1e-4)
    assert computed == [True]


def test_an_unverified_sync_sends_once_and_proves_nothing(engine, policy):
    report = publish(engine, Stream(policy, {2: swapped}), version=1, tolerance=1e-4, verify=False)
    assert math.isnan(report.canary_max_gap) and list(report.parts) == ["inspect", "send"]


def test_samples_follow_the_published_weights(engine, policy, folder, tmp_path):
    publish(engine, Stream(policy), version=1, tolerance=1e-4)
    fresh = TransformersEngine(save(policy, tmp_path), make_tokenizer())
    fresh.adopt(1)
    asked = call(make_prompts(4, 7), num_completions=2, sampling=SamplingParams(8), seeds=[1, 2])
    assert engine.generate(asked) == fresh.generate(asked)


def hash_words(flats):
    hashes = WordHashes()
    for flat in flats:
        hashes.add(flat)
    return hashes.found()


def words(tensor):
    return hash_words([tensor.contiguous().view(-1).view(torch.uint8)])[0]


def xxh(tensor):
    return fingerprints([("x", tensor)])["x"]


@pytest.mark.parametrize("digest", [words, xxh], ids=["cuda", "cpu"])
def test_both_hashes_see_order_scale_sign_and_length(digest):
    """The CUDA hash is plain integer arithmetic, so it is tested here on the CPU.

    5,000,003 bfloat16 numbers are 1,250,001 words of 8 bytes, in 1,221 rows. The words at numbers 4 and
    4,194,308 have the same column.
    """
    x = torch.randn(5_000_003, generator=torch.Generator().manual_seed(0)).bfloat16()
    changed = [x.clone() for _ in range(6)]
    changed[0][[5, 9]] = x[[9, 5]]
    changed[1][4:8], changed[1][4_194_308:4_194_312] = x[4_194_308:4_194_312], x[4:8]
    changed[2][-1] += 1
    changed[3][[3, 7]] = -x[[3, 7]]  # the sign bits are the top bits of two 64-bit words
    changed[4] *= 2
    changed[5][:] = x.roll(1)
    hashes = [digest(t) for t in [x, *changed, x[:-1], torch.cat([x, torch.zeros(1).bfloat16()])]]
    assert len(set(hashes)) == 9
    assert digest(x.clone()) == hashes[0]


def test_the_cuda_hash_gives_the_sum_that_its_docstring_states():
    """1,027 words, the last one of 4 bytes, against Python's unbounded integers."""
    data = (torch.arange(1026 * 8 + 4) * 12 + 7).to(torch.uint8)
    raw = bytes(data.tolist()) + bytes(4)
    mask = 2**64 - 1

    def odd(number):
        z = number * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return (z ^ z >> 31) | 1

    total = len(data)
    for i in range(1027):
        w = int.from_bytes(raw[8 * i : 8 * i + 8], "little")
        total += odd(1025 + i // 1024) * odd(1 + i % 1024) * (w ^ w >> 32)
    assert hash_words([data])[0] & mask == total & mask


def test_the_cuda_hash_does_not_depend_on_what_else_is_hashed(monkeypatch):
    sizes = [8192 * 3, 5, 0, 8192 * 9 + 17, 8192, 100_000]
    tensors = [torch.randint(0, 256, (n,), dtype=torch.uint8) for n in sizes]
    alone = [hash_words([t])[0] for t in tensors]
    assert hash_words(tensors) == alone and len(set(alone)) == 6
    monkeypatch.setattr("rollout.fingerprint._BATCH_ROWS", 4)  # of 3 + 1 + 0 + 10 + 1 + 13 rows
    assert hash_words(tensors) == alone


def test_sampled_columns_cover_the_width_in_turn():
    assert sampled_columns(20, 0) == [0, 3, 6, 9, 12, 15, 18]
    assert sampled_columns(20, 1) == [1, 4, 7, 10, 13, 16, 19]
    assert sampled_columns(6, 5) == [0, 1, 2, 3, 4, 5]
    for width in (8, 9, 64, 576, 1536):
        periods = -(-width // 8)
        seen = sorted(c for version in range(100, 100 + periods) for c in sampled_columns(width, version))
        assert seen == list(range(width))


def test_a_sampled_fingerprint_compares_whole_columns_in_the_engines_dtype():
    held = HeldTensor((2, 20), torch.bfloat16, torch.device("cpu"), "x", sampled=True)
    x = torch.arange(40.0).view(2, 20) + 0.001
    part = compared_part(x, held, version=1)
    assert part.tolist() == [[c, 20.0 + c] for c in (1, 4, 7, 10, 13, 16, 19)]
    assert part.dtype == torch.bfloat16
    assert torch.signbit(compared_part(-0.0 * x, held, 0)).sum() == 0


def test_mismatches_name_what_differs_and_what_one_side_lacks():
    assert mismatches({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 5, "d": 4}) == ["b", "c", "d"]
