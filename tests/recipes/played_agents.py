"""Programs of a user: they know nothing but an OpenAI-compatible address."""

from __future__ import annotations

import functools
import json
import threading
import time

TOOLS = [{"type": "function", "function": {"name": "double", "parameters": {"type": "object"}}}]


@functools.cache
def connection():
    import httpx

    return httpx.Client(verify=False, timeout=60)  # certificates take longer to read than an answer


def ask(base_url, api_key, messages, **more):
    import openai

    client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0, http_client=connection())
    return client.chat.completions.create(model="policy", messages=messages, **more).choices[0]


def echo(message):
    return {"role": "assistant", "content": message.content}


def two_turns(base_url, api_key, row, seed):
    """Pays the length of the second answer."""
    messages = list(row["prompt"])
    messages.append(echo(ask(base_url, api_key, messages).message))
    messages.append({"role": "user", "content": [{"type": "text", "text": f"and {row['word']} {seed}?"}]})
    return len(ask(base_url, api_key, messages).message.content)


def calls_a_tool(base_url, api_key, row, seed):
    messages = list(row["prompt"])
    choice = ask(base_url, api_key, messages, tools=TOOLS)
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    found = 2 * json.loads(call.function.arguments)["x"]
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": str(found)}]
    return float(ask(base_url, api_key, messages, tools=TOOLS).message.content == str(found))


def rewrites(base_url, api_key, row, seed):
    messages = list(row["prompt"])
    ask(base_url, api_key, messages)
    messages += [{"role": "assistant", "content": "I said otherwise"}, {"role": "user", "content": "go on"}]
    ask(base_url, api_key, messages)


def asks_otherwise(base_url, api_key, row, seed):
    ask(base_url, api_key, [{"role": "user", "content": "another question"}])


def streams(base_url, api_key, row, seed):
    ask(base_url, api_key, list(row["prompt"]), stream=True)


def guesses_a_token(base_url, api_key, row, seed):
    ask(base_url, "x" * len(api_key), list(row["prompt"]))


def asks_twice_at_once(base_url, api_key, row, seed):
    asking = [threading.Thread(target=ask, args=(base_url, api_key, row["prompt"])) for _ in range(3)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()


def sleeps(base_url, api_key, row, seed):
    time.sleep(600)


def raises(base_url, api_key, row, seed):
    raise KeyError("no such key")


def pays_nothing(base_url, api_key, row, seed):
    ask(base_url, api_key, list(row["prompt"]))
