"""Questions of several hops about a generated knowledge base, which a search over its documents answers."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec

import pytest

from recipes.environments import load
from recipes.environments.search import World, rows
from rollout.environment import Turn

pytestmark = pytest.mark.skipif(find_spec("bm25s") is None, reason="needs bm25s")


def called(query: str) -> str:
    return f"<tool_call>{json.dumps({'name': 'search', 'arguments': {'query': query}})}</tool_call>"


def answer_by_reading(documents: list[str], question: str) -> str:
    """The answer as a reader of all documents finds it, hop by hop."""
    text = "\n".join(documents)
    (person,) = [word for word in re.findall(r"\w+", question) if f"{word} was born in " in text]
    for _ in range(question.count("mother of")):
        (person,) = re.findall(rf"{person}'s mother is (\w+)\.", text)
    (city,) = re.findall(rf"{person} was born in (\w+)\.", text)
    if "river" not in question:
        return city
    (river,) = re.findall(rf"{city} lies on the river (\w+)\.", text)
    return river


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
def test_the_answer_is_what_a_reader_of_the_documents_finds(hops):
    documents = World.drawn(50, 7).documents
    for row in rows(40, hops=hops, num_people=50, seed=7):
        assert answer_by_reading(documents, row["prompt"]) == row["answer"]
        assert row["answer"] not in row["prompt"]


def test_another_seed_is_another_world_and_the_same_seed_the_same():
    assert World.drawn(20, 1) == World.drawn(20, 1) != World.drawn(20, 2)
    people = World.drawn(20, 1).mother
    with pytest.raises(ValueError, match="hops=0: a question takes at least one document"):
        rows(1, hops=0)
    for number in (1, 3000):  # a world with too few names would be drawn for ever
        with pytest.raises(ValueError, match=f"num_people={number} must be from 2 to 2000"):
            rows(1, num_people=number)
    with pytest.raises(ValueError, match="num_found=40 must be from 1 to 25"):
        load("search", {"num_people": 20, "num_found": 40})
    assert len(people) == 20 and all(child != mother for child, mother in people.items())


def test_a_policy_that_searches_hop_by_hop_is_paid_and_one_that_guesses_is_not():
    environment = load("search", {"num_people": 60, "seed": 3})
    for row in rows(20, hops=3, num_people=60, seed=3):
        episode = environment.open(row, 0)
        (person,) = re.findall(r"mother of (\w+) was born", row["prompt"])
        found = ""
        for query, pattern in (
            (f"{person} mother", rf"{person}'s mother is (\w+)\."),
            ("{} born", r"{} was born in (\w+)\."),
            ("{} river", r"{} lies on the river (\w+)\."),
        ):
            reply = episode.step(Turn(0, called(query.format(found))))
            (found,) = re.findall(pattern.format(found), reply.messages[0]["content"])
        assert reply.facts["calls"] == 1 and not reply.done
        last = episode.step(Turn(3, f"<think>x</think>It is <answer> {found.upper()}. </answer>"))
        assert last.done and last.reward == 1.0
        assert environment.open(row, 0).step(Turn(0, "I guess <answer>Kalomti</answer>")).reward == 0.0
    assert environment.search("zzz") == environment.search("") == "nothing found"
    assert environment.tools[0]["function"]["name"] == "search"
    environment.close()
