"""Single-player games of TextArena 0.7.4, each loaded alone: importing the whole package uses the network."""

from __future__ import annotations

import importlib.util
import random
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from rollout.environment import Environment, EnvironmentFault, Episode, Reply, Turn

GAMES = ("FrozenLake", "LightsOut", "Mastermind", "Minesweeper", "TowerOfHanoi")

DIGITS = re.compile(r"\d{18,}")  # int() raises on thousands of digits, and the games do not catch it


def game_class(name: str) -> Any:
    """The class of a game, from its own module and the two that it needs.

    Raises:
        ValueError: there is no such game, or the package is missing.
    """
    if name not in GAMES:
        raise ValueError(f"game={name!r} is not one of {', '.join(GAMES)}")
    if importlib.util.find_spec("textarena") is None:
        raise ValueError("the games need the package textarena; pip install --no-deps textarena==0.7.4")
    if "textarena" not in sys.modules:
        for part in ("textarena", "textarena.envs"):  # empty packages: their own code is not run
            spec = importlib.util.find_spec(part)
            assert spec is not None
            sys.modules[part] = importlib.util.module_from_spec(spec)
        for part in ("core", "state"):
            names = vars(import_module(f"textarena.{part}"))
            vars(sys.modules["textarena"]).update({k: v for k, v in names.items() if not k.startswith("_")})
    return getattr(import_module(f"textarena.envs.{name}.env"), f"{name}Env")


class Game(Environment):
    """A game; TextArena's own reward pays it at its end. `rows` makes the prompts, with the same options.

    Args:
        game: one of `GAMES`; further options are those of its class.
    """

    repeatable, tools = True, ()

    def __init__(self, game: str, **options: Any) -> None:
        self.made, self.options = game_class(game), options
        Playing(self, 0)  # so that wrong options fail at once

    def open(self, row: Mapping[str, Any], seed: int, state: Any = None) -> Playing:
        playing = Playing(self, int(row["game_seed"]))
        if playing.shown != row["shown"]:
            raise EnvironmentFault(
                "the row shows another game; use the same options for rows and environment"
            )
        for number, action in enumerate((state or {"actions": []})["actions"]):
            playing.step(Turn(number, action))
        return playing


class Playing(Episode):
    """A game in progress; `shown` is its first message."""

    def __init__(self, owner: Game, seed: int) -> None:
        self.game, self.seed, self.actions = owner.made(**owner.options), seed, list[str]()
        random.seed(seed)
        self.game.reset(num_players=1, seed=seed)
        self.shown = _text(self.game.get_observation()[1])

    def step(self, turn: Turn) -> Reply:
        self.actions.append(turn.text)
        random.seed(f"{self.seed}/{turn.number}")  # a process holds many games, and they share the generator
        spoken = DIGITS.sub(lambda number: number[0][:18], turn.text.rpartition("</think>")[2])
        is_over, _ = self.game.step(spoken)
        if is_over:
            return Reply((), float(self.game.close()[0][0]), done=True, state={})
        said = {"role": "user", "content": _text(self.game.get_observation()[1])}
        return Reply((said,), state={"actions": self.actions})


def _text(observations: Sequence[tuple[int, str, Any]]) -> str:
    """What the game says, without the player's own words."""
    return "\n".join(text for _, text, kind in observations if kind.name != "PLAYER_ACTION").strip()


def rows(game: str, num_rows: int = 1000, seed: int = 0, **options: Any) -> list[dict[str, Any]]:
    """The first message of a game for each of the seeds from `seed` on."""
    made = Game(game, **options)
    shown = [(i, Playing(made, i).shown) for i in range(seed, seed + num_rows)]
    return [{"prompt": f"Game {i}.\n{text}", "game_seed": i, "shown": text} for i, text in shown]
