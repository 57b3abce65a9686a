"""Graders: (prompt, completion) -> Reward. No torch, no network, no model.

The contract of a reward function, which is TRL's, so that one function runs here and there unchanged:

    from rewards.completion import last_message_text

    def short_and_right(completions, answer, max_chars=400, **columns):
        scores = []
        for completion, gold in zip(completions, answer):
            text = last_message_text(completion)
            if not gold:
                scores.append(None)              # no verdict: left out, never a 0
            else:
                scores.append(float(gold in text and len(text) <= max_chars))
        return scores

    rewards:
      functions:
        - {name: "my_rewards:short_and_right", weight: 1.0, options: {max_chars: 200}}
        - {name: think_format, weight: 0.1}

What `completions` holds: where the prompt is a chat (a list of messages, or text under `data.chat`, which is
on by default), each completion is a list with one message, `[{"role": "assistant", "content": "..."}]`. With
`data.chat: false` it is the text. `last_message_text` takes both; `len(completion)` would count messages.

What else it gets, by keyword and only what its signature names (or `**columns`): `prompts` (messages or texts
likewise), `completion_ids`, each column of the dataset as a list as long as `completions`, and TRL's
`trainer_state` (with `global_step` and `max_steps`), `log_extra` and `log_metric` (which do nothing here).

What it returns: one number or None per completion, in order; or `rl.types.Reward`, to say why. It may be
async. A factory (a class, or a function that takes no completions) is called with the options and returns
the reward.

A reward's process has this one's environment without secrets (names such as HF_TOKEN and WANDB_API_KEY,
URLs with a password). One that calls a service gets its key by COHORT_GRADER_ENV=OPENAI_API_KEY (names, by
commas).

What one call covers: all completions of one prompt, and of no other, so that a function may compare them;
those that the engine aborted are left out. If such a call fails, each completion is called alone to find the
culprit. That one abstains, and the others are called together once more. A call has `rewards.deadline_s` for
each of its completions. A function marked `@rewards.plugins.per_completion`, or by the option
`per_completion: true`, gets one completion a call, as do the built-in rewards, except those that compare.
One marked `@rewards.plugins.ignores_answer`, or by such an option, need not pass the doctor's questions about
right and wrong answers: its scores must be the same beside any.

What a reward prints goes into `graders.log` of the run folder.

A reward that keeps a longer deadline of its own, and scores what misses it, says so by an attribute
`time_limit_s`: seconds for one completion, or a function of the options that returns them.

Built in, with their options:

    math                    column answer; see rewards.math
    math_verify             column answer; the package math-verify, for a second opinion
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
    random_control          seed; format_control: reward, options; what rewards.control puts in
    verl, openrlhf, areal   function, answer="answer"; openrlhf is group-wise

Elsewhere: a package offers a reward by name through the entry point group `cohort.rewards`;
`rewards.adapters` carries rewards to and from TRL, verl, OpenRLHF and AReaL; `cohort score` grades a file,
`cohort doctor rewards` checks a reward against its dataset before a run.
"""
