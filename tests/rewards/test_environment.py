"""Graders run generated text: they inherit no secrets, unless a user names them."""

from __future__ import annotations

import os

from rewards.environment import grader_environment
from rewards.pool.pool import RewardPool
from rl.types import Completion, Group, Prompt

SECRETS = {
    "HF_TOKEN": "a",
    "WANDB_API_KEY": "b",
    "AWS_SECRET_ACCESS_KEY": "c",
    "DB_PASSWORD": "d",
    "MYTOKEN": "e",
    "HTTPS_PROXY": "http://me:word@proxy:80",
    "PLAIN": "hf_abcdefghijklmnopqrstuvwx",
    "SSH_AUTH_SOCK": "/tmp/agent",
}
PUBLIC = {
    "PATH": "/bin",
    "PWD": "/home/me",
    "TOKENIZERS_PARALLELISM": "false",
    "KEYBOARD": "us",
    "MONKEY_ISLAND": "1",
    "HTTP_PROXY": "http://proxy:80",
    "SSH_PUBLIC_KEY": "ssh-ed25519 AAAA",
}


def test_secrets_are_left_out_by_name_and_by_value():
    assert grader_environment(SECRETS | PUBLIC) == PUBLIC


def test_a_user_may_name_what_a_reward_needs():
    asked = {"COHORT_GRADER_ENV": "HF_TOKEN, DB_PASSWORD"}
    kept = {name: SECRETS[name] for name in ("HF_TOKEN", "DB_PASSWORD")}
    assert grader_environment(SECRETS | PUBLIC | asked) == PUBLIC | asked | kept


def seen(completions, **_):
    """1 for a variable that a grader sees, else 0."""
    return [float(text in os.environ) for text in completions]


def test_a_real_grader_sees_no_token_and_what_it_was_given(monkeypatch):
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "HARMLESS"):
        monkeypatch.setenv(name, "value")
    monkeypatch.setenv("COHORT_GRADER_ENV", "OPENAI_API_KEY")
    names = ["HF_TOKEN", "OPENAI_API_KEY", "HARMLESS"]
    completions = [Completion([1], [], [True], "stop", [], text=name) for name in names]
    pool = RewardPool(["test_environment:seen"])
    try:
        (scored,) = pool.score([Group(Prompt("p", "", ()), completions)])
    finally:
        pool.close()
    assert [reward.score for reward in scored.rewards] == [0.0, 1.0, 1.0]
