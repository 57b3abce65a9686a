"""Graders: (prompt, completion) -> Reward. No torch, no network, no model.

A reward in ten lines, in `my_rewards.py` beside the config (TRL's signature, so it also runs there):

    def short_and_right(completions, answer, max_chars=400, **columns):
        scores = []
        for completion, gold in zip(completions, answer):
            text = completion if isinstance(completion, str) else completion[-1]["content"]
            if not gold:
                scores.append(None)              # no verdict: left out, never a 0
            else:
                scores.append(float(gold in text and len(text) <= max_chars))
        return scores

    rewards:
      functions:
        - {name: "my_rewards:short_and_right", weight: 1.0, options: {max_chars: 200}}
        - {name: think_format, weight: 0.1}

What it gets, always by keyword and only what its signature names (or `**columns`): `prompts`, `completions`
(texts, or messages where the prompt is a chat), `completion_ids`, and each column of the dataset as a list as
long as `completions`. What it returns: a list of numbers or None, or of `rl.types.Reward` to say why. It may
be async. A factory (a class, or a function that takes no completions) is called with the options and returns
the reward.

Its process has this one's environment without secrets (names such as HF_TOKEN and WANDB_API_KEY, URLs with a
password). One that calls a service gets its key by COHORT_GRADER_ENV=OPENAI_API_KEY (names, by commas).

A reward that compares the completions of one prompt is marked: `@rewards.plugins.groupwise`, or the option
`groupwise: true`. Only then does one call hold a whole group, and always exactly one; any other function is
called for each completion alone, as soon as that is sampled, in a process that is killed at the deadline
(`rewards.pool`). A reward that keeps a longer deadline of its own, and scores what misses it, says so by an
attribute `time_limit_s`: seconds for one completion, or a function of the options that returns them.

Built in, with their options:

    math                    column answer; see rewards.math
    code                    column tests; see rewards.code
    think_format            open_in_prompt=false
    think_answer_format     open_in_prompt=false
    tag_count, boxed_format
    code_format             language="python"
    language_consistency    language="en"
    soft_overlong           max_length, buffer
    repetition              ngram_size=3, max_penalty=-1.0
    cosine_length           max_length, accuracy="math", min_/max_correct, min_/max_wrong
    kimi_length             accuracy="math"; group-wise
    box_iou, mask_iou       column box (form="xyxy"), column mask
    reasoning_gym           column entry; strict=true, answer_in="auto"
    verl, openrlhf, areal   function, answer="answer"

Elsewhere: a package offers a reward by name through the entry point group `cohort.rewards`;
`rewards.adapters` carries rewards to and from TRL, verl, OpenRLHF and AReaL; `cohort score` grades a file,
`cohort doctor rewards` checks a reward against its dataset before a run.
"""
