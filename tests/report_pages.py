"""What tests of the report share: a run folder made by hand, and what a reader of its page finds."""

import html.parser
import json

from rl.report.shelf import Shelf
from rl.store.ledger import Ledger
from rl.types import Completion, Group, Prompt, Reason, Reward, ScoredGroup, VersionSpan


def scored_group(
    texts, scores, *, prompt_id="train/000001", prompt="What is 2 + 2?", finish="stop", **reward
):
    completions = [
        Completion([1, 2, 3], [-0.5, -0.25, -3.0], [True] * 3, finish, [VersionSpan(0, 3)], text)
        for text in texts
    ]
    rewards = [Reward(score, Reason.SCORED, **reward) for score in scores]
    return ScoredGroup(Group(Prompt(prompt_id, prompt, (1,), columns={"answer": "4"}), completions), rewards)


def write_step(run_dir, step, groups, advantages=None, **ledger):
    Ledger(run_dir, **ledger).write(
        step, groups, cursor_before=0, cursor_after=1, policy_version=0, advantages=advantages
    )


def shelved(run_dir):
    """The groups of a run with room for all of them in the page, and what could not be read."""
    shelf = Shelf(run_dir, run_dir / "report")
    shelf.refresh()
    return groups_in(json.loads(shelf.records_json()), json.loads(shelf.texts_json())), shelf.faults


def groups_in(records, texts):
    found = []
    for kind, step, rank, parts, rows in records:
        for i, (prompt_id, words, mean, spread, tags, _) in enumerate(rows):
            held = texts[f"{kind}{step}-{rank}"][i] if parts is None else {"completions": None}
            found.append({"kind": kind, "step": step, "id": prompt_id, "words": words, "mean": mean} | held)
            found[-1] |= {"spread": spread, "tags": tags, "parts": parts}
    return found


class Page(html.parser.HTMLParser):
    """The elements, texts and scripts of a page, as a browser's parser sees them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.scripts, self.words = [], [], [], []
        self.meta = {}
        self._inside = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._inside = tag
        if tag == "script":
            self.scripts.append([dict(attrs), ""])
        if tag == "meta":
            self.meta[dict(attrs).get("http-equiv")] = dict(attrs).get("content")

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside == "script":
            self.scripts[-1][1] += data
        elif self._inside != "style":
            self.words.append(data)

    @property
    def data(self):
        return {attrs["id"]: json.loads(body) for attrs, body in self.scripts if "id" in attrs}

    @property
    def groups(self):
        return groups_in(self.data["records"], self.data["texts"])

    @property
    def curves(self):
        return self.data["curves"][0]["curves"]

    @property
    def text(self):
        return " ".join(self.words)
