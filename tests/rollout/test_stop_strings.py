"""A stop string ends a completion on the ids that were sampled."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from recipes.grpo import main
from recipes.sources import sampling_params
from rl.config import SamplingConfig
from rl.config.read import load_config
from rl.types import Completion, Prompt, SamplingParams, VersionSpan
from rollout.calls import decode_texts
from rollout.transformers import TransformersEngine
from tests.calling import call

EOS = 1


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


def completion_of(ids, reason) -> Completion:
    spans = [VersionSpan(3, 2), VersionSpan(4, len(ids) - 2)]
    return Completion(list(ids), [-float(i) for i in ids], [True] * len(ids), reason, spans)


@pytest.mark.parametrize(
    ("words", "stop", "kept", "text"),
    [
        (["w1", "w2", "w3", "w4"], ["w3"], 3, "w1w2w3"),
        (["w1", "w2", "w3", "w4"], ["1w"], 2, "w1w2"),  # completed inside a token, whose rest stays
        (["w1", "w2", "w3", "w4"], ["w4", "2w"], 3, "w1w2w3"),  # whichever comes first
        (["w1", "w2", "w3", "w4"], ["w5"], 4, "w1w2w3w4"),
        (["w1", "w2", "w3", "<eos>"], ["w3"], 3, "w1w2w3"),
        (["w1", "w2", "<assistant>", "w4"], ["<assistant>"], 3, "w1w2<assistant>"),
    ],
)
def test_a_completion_ends_behind_the_token_that_completes_a_string(tokenizer, words, stop, kept, text):
    ids = tokenizer.convert_tokens_to_ids(words)
    c = completion_of(ids, "length")
    decode_texts(tokenizer, [c], stop)
    assert (c.token_ids, c.text) == (ids[:kept], text)
    assert c.behavior_logprobs == [-float(i) for i in ids[:kept]] and c.loss_mask == [True] * kept
    assert sum(span.num_tokens for span in c.version_spans) == kept
    assert c.finish_reason == ("length" if kept == 4 else "stop")


def test_versions_are_cut_with_their_tokens(tokenizer):
    c = completion_of(tokenizer.convert_tokens_to_ids(["w1", "w2", "w3"]), "stop")
    decode_texts(tokenizer, [c], ["w1"])
    assert c.version_spans == [VersionSpan(3, 1)]


def test_an_engine_samples_the_same_ids_and_cuts_them(tiny_model_dir, tokenizer):
    engine = TransformersEngine(tiny_model_dir, tokenizer)
    prompts = [Prompt(str(i), "", (5 + i,)) for i in range(4)]

    def sample(**options):
        sampling = SamplingParams(12, stop_token_ids=(EOS,), **options)
        groups = engine.generate(call(prompts, num_completions=4, sampling=sampling, seeds=range(4)))
        return [c for group in groups for c in group.completions]

    whole, cut = sample(), sample(stop=("w1", "w2"))
    assert sum(len(a.token_ids) > len(b.token_ids) for a, b in zip(whole, cut, strict=True)) > 3
    for a, b in zip(whole, cut, strict=True):
        n = len(b.token_ids)
        assert (a.token_ids[:n], a.behavior_logprobs[:n]) == (b.token_ids, b.behavior_logprobs)
        before = tokenizer.decode(b.token_ids[:-1])
        assert "w1" not in before and "w2" not in before
        if n < len(a.token_ids):
            assert b.finish_reason == "stop" and ("w1" in b.text or "w2" in b.text)


def test_the_key_reaches_the_engine_and_needs_text():
    assert sampling_params(SamplingConfig(stop=["</answer>"]), [1]).stop == ("</answer>",)
    with pytest.raises(ValueError, match=r"sampling\.stop"):
        load_config(None, ["sampling.stop=['']"])


def test_a_diffusion_model_refuses_it(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("diffusion: {}\nsampling: {stop: [x]}\n")
    assert main([str(tmp_path / "c.yaml"), f"run_dir={tmp_path}/run"]) == 1
    assert "use sampling.stop_token_ids, which end a block" in capsys.readouterr().err
