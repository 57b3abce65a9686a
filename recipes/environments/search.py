"""Search over a generated knowledge base: a model cannot know the answers to its multi-hop questions."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recipes.environments.gym import spoken_answer
from recipes.environments.tools import Calling, schemas
from rollout.environment import Environment

PARTS = [
    "ba",
    "do",
    "fen",
    "gir",
    "hul",
    "ka",
    "lom",
    "mi",
    "nar",
    "o",
    "pel",
    "ru",
    "sta",
    "ti",
    "vor",
    "ze",
]


@dataclass(frozen=True)
class World:
    """People with a mother and a city of birth, and cities with a river, drawn from a seed."""

    mother: dict[str, str]
    city: dict[str, str]
    river: dict[str, str]

    @classmethod
    def drawn(cls, num_people: int, seed: int) -> World:
        if not 2 <= num_people <= 2000:  # three-syllable names run out soon
            raise ValueError(f"num_people={num_people} must be from 2 to 2000; use num_people=200")
        draw, used = random.Random(seed), set()

        def name() -> str:
            while (made := "".join(draw.choices(PARTS, k=3)).capitalize()) in used:
                pass
            used.add(made)
            return made

        people, cities = ([name() for _ in range(n)] for n in (num_people, max(2, num_people // 4)))
        mothers = {
            p: people[(i + 1 + draw.randrange(num_people - 1)) % num_people] for i, p in enumerate(people)
        }
        return cls(mothers, {p: draw.choice(cities) for p in people}, {city: name() for city in cities})

    @property
    def documents(self) -> list[str]:
        people = [f"{p} was born in {self.city[p]}. {p}'s mother is {m}." for p, m in self.mother.items()]
        return people + [f"{city} lies on the river {river}." for city, river in self.river.items()]

    def question(self, person: str, hops: int) -> tuple[str, str]:
        """A question and its answer, which takes `hops` documents to find; ValueError for hops < 1."""
        if hops < 1:
            raise ValueError(f"hops={hops}: a question takes at least one document; use hops=2")
        if hops == 1:
            return f"In which city was {person} born?", self.city[person]
        named, who = person, person
        for _ in range(hops - 2):
            named, who = f"the mother of {named}", self.mother[who]
        return f"On which river lies the city in which {named} was born?", self.river[self.city[who]]


class Search(Environment):
    """The tool `search` by BM25 (bm25s). A turn without a call ends the episode and pays 1 if it is right.

    Args:
        num_people, seed: of the knowledge base, as for `rows`.
        num_found: number of documents that a search returns.
    """

    repeatable = True

    def __init__(self, *, num_people: int = 200, seed: int = 0, num_found: int = 3) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise ValueError(f"the search needs the package bm25s ({error}); pip install bm25s") from None
        self.documents, self.num_found = World.drawn(num_people, seed).documents, num_found
        if not 1 <= num_found <= len(self.documents):
            raise ValueError(
                f"num_found={num_found} must be from 1 to {len(self.documents)}; use num_found=3"
            )
        self.words = lambda texts: bm25s.tokenize(texts, stopwords="en", show_progress=False)
        self.index = bm25s.BM25()
        self.index.index(self.words(self.documents), show_progress=False)
        self.tools = schemas([self.search])

    def search(self, query: str) -> str:
        """
        Finds documents by their words.

        Args:
            query: what to look for.
        """
        found, scores = self.index.retrieve(self.words([query]), k=self.num_found, show_progress=False)
        kept = [self.documents[i] for i, score in zip(found[0], scores[0], strict=True) if score > 0]
        return "\n".join(kept) or "nothing found"

    def open(self, row: Mapping[str, Any], seed: int, state: Any = None) -> Calling:
        wanted = str(row["answer"]).casefold()
        paid = lambda turn: float(spoken_answer(turn.text).rstrip(".").casefold() == wanted)  # noqa: E731
        return Calling({"search": self.search}, seed, paid=paid)


def rows(num_rows: int = 1000, hops: int = 2, num_people: int = 200, seed: int = 0) -> list[dict[str, Any]]:
    """Questions about the knowledge base of that seed; the answer goes between <answer> and </answer>."""
    world, draw = World.drawn(num_people, seed), random.Random(seed + 1)
    asked = [world.question(draw.choice(list(world.mother)), hops) for _ in range(num_rows)]
    told = "Search for what you need. Put the answer, one word, into <answer> and </answer>."
    return [{"prompt": f"{question} {told}", "answer": answer, "hops": hops} for question, answer in asked]
