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

What `completions` holds: for a chat prompt (a list of messages, or text under `data.chat`, which is on by
default), each completion is a list with one message, `[{"role": "assistant", "content": "..."}]`. With
`data.chat: false` it is plain text. `last_message_text` accepts both; `len(completion)` would count messages.

What else it gets: the keywords that its signature names, or all of them if it has `**columns`. These are
`prompts` (messages or texts likewise), `completion_ids` and each column of the dataset, as lists as long as
`completions`. TRL's `trainer_state` (with `global_step` and `max_steps`), `log_extra` and `log_metric` (which
do nothing here) are passed, too.

What it returns: one number or None per completion, in order, or `rl.types.Reward` to give a reason. It may be
async. A factory (a class, or a function that takes no completions) is called with the options and returns the
reward function.

Rewards run in processes that inherit the environment without secrets (variables such as HF_TOKEN and
WANDB_API_KEY, URLs with a password). To pass on the key of a service, list its name in COHORT_GRADER_ENV,
such as COHORT_GRADER_ENV=OPENAI_API_KEY,HF_TOKEN.

What one call covers: all completions of one prompt, so that a function may compare them, without those that
the engine aborted. If the call fails, each completion is graded alone to find the one at fault. That one
abstains, and the others are graded together once more. A call may take `rewards.deadline_s` seconds per
completion. A function marked `@rewards.plugins.per_completion` (or by the option `per_completion: true`) gets
one completion per call. So do the built-in rewards, except those that compare completions.
`@rewards.plugins.ignores_answer` (or the option) marks a reward that does not look at the right answer: the
doctor then checks only that its scores do not change with the answer.

Whatever a reward prints goes to `graders.log` in the run folder.

A reward may enforce a longer deadline of its own and score what misses it. It declares this as an attribute
`time_limit_s`: seconds per completion, or a function that computes them from the options.

Built in, with their options:

    math                    column answer; see rewards.math.grader
    math_verify             column answer; the package math-verify, for a second opinion
    code                    column tests; see rewards.code.grader
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
    random_control          seed; format_control: reward, options; both set by rewards.control
    verl, openrlhf, areal   function, answer="answer"; openrlhf is group-wise

Elsewhere: a package offers a reward by name through the entry point group `cohort.rewards`;
`rewards.adapters` carries rewards to and from TRL, verl, OpenRLHF and AReaL; `cohort score` grades a file,
`cohort doctor rewards` checks a reward against its dataset before a run.
"""
