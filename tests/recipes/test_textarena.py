"""Five games of TextArena are won by solvers that read what the games say, and replayed."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
import sys
from collections import deque

import pytest

from recipes.environments import load
from recipes.environments.textarena import GAMES, rows
from rollout.environment import EnvironmentFault, Turn

if importlib.util.find_spec("textarena") is None:
    pytest.skip("textarena is not installed", allow_module_level=True)


def frozen_lake(shown, ask):
    """Breadth first through what is not a hole."""
    lines = re.findall(r"^\|.*\|$", shown, re.MULTILINE)
    grid = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    steps = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
    paths, seen = deque([((0, 0), [])]), {(0, 0)}
    while paths:
        (r, c), path = paths.popleft()
        if grid[r][c] == "G":
            break
        for name, (dr, dc) in steps.items():
            to = (r + dr, c + dc)
            if all(0 <= x < len(grid) for x in to) and to not in seen and grid[to[0]][to[1]] != "H":
                seen.add(to)
                paths.append((to, [*path, name]))
    return [ask(f"I go [{name}]") for name in path][-1]


def lights_out(shown, ask):
    """The presses that turn all lights off, among all sets of presses of a grid of 3 x 3."""
    grid = [row.split() for row in re.findall(r"^\d: (.*)$", shown, re.MULTILINE)]
    lit = {(r, c) for r in range(3) for c in range(3) if grid[r][c] == "O"}
    cells = list(itertools.product(range(3), repeat=2))
    for number in range(10):
        for presses in itertools.combinations(cells, number):
            on = set(lit)
            for r, c in presses:
                on ^= {(r, c), (r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)} & set(cells)
            if not on:
                return [ask(f"[{r} {c}]") for r, c in presses][-1]
    raise AssertionError("no set of presses solves it")


def mastermind(shown, ask):
    """Guesses that fit all that was answered."""
    codes = list(itertools.permutations(range(1, 7), 4))
    while True:
        guess = codes[0]
        reply = ask(f"[{' '.join(map(str, guess))}]")
        if reply.done:
            return reply
        black, white = map(int, re.findall(r"(\d) black peg.*(\d) white", reply.messages[0]["content"])[0])
        same = lambda code, guess=guess: sum(a == b for a, b in zip(code, guess, strict=True))  # noqa: E731
        codes = [c for c in codes if (same(c), len({*c} & {*guess}) - same(c)) == (black, white)]


def hanoi(shown, ask):
    moves = ["A C", "A B", "C B", "A C", "B A", "B C", "A C"]  # 2^3 - 1, the fewest for three disks
    return [ask(f"[{move}]") for move in moves][-1]


@pytest.mark.parametrize(
    ("game", "options", "solve"),
    [
        ("FrozenLake", {}, frozen_lake),
        ("LightsOut", {"size": 3}, lights_out),
        ("Mastermind", {}, mastermind),
        ("TowerOfHanoi", {}, hanoi),
    ],
)
def test_a_game_that_is_solved_pays_one(game, options, solve):
    environment = load("textarena", {"game": game, **options})
    made = rows(game, 4, seed=5, **options)
    assert len({row["prompt"] for row in made}) == 4
    for row in made:
        episode, turns = environment.open(row, 0), itertools.count()
        last = solve(row["shown"], lambda text, e=episode, t=turns: e.step(Turn(next(t), text)))
        assert last.done and last.reward == 1.0


def test_minesweeper_pays_by_what_was_revealed():
    """The mines of a game are looked up: another way to win is luck."""
    environment = load("textarena", {"game": "Minesweeper", "num_mines": 5})
    (row,) = rows("Minesweeper", 1, num_mines=5)
    episode = environment.open(row, 0)
    reply = episode.step(Turn(0, "[0 0]"))
    number = 0
    while not reply.done:
        game, number = episode.game, number + 1
        r, c = next(
            (r, c) for r in range(8) for c in range(8) if game.grid[r][c] != -1 and not game.revealed[r][c]
        )
        reply = episode.step(Turn(number, f"[{r} {c}]"))
    assert reply.reward == 1.0


@pytest.mark.parametrize("game", GAMES)
def test_a_game_goes_on_from_its_actions_whatever_was_drawn_meanwhile(game):
    environment = load("textarena", {"game": game})
    row = rows(game, 1, seed=9)[0]
    action = {"FrozenLake": "[right]", "Mastermind": "[1 2 3 4]", "TowerOfHanoi": "[A B]"}.get(game, "[0 0]")
    first = environment.open(row, 0).step(Turn(0, action))
    others = [environment.open(row, 0) for _ in range(2)]  # games share one generator
    again = environment.open(row, 1, first.state)
    assert others[0].step(Turn(0, action)) == first
    replies = [again.step(Turn(1, "nonsense")), others[0].step(Turn(1, "nonsense"))]
    assert replies[0] == replies[1] and not replies[0].done  # one wrong move is forgiven
    assert again.step(Turn(2, "nonsense")).done


@pytest.mark.parametrize("game", ["LightsOut", "Minesweeper"])
def test_a_number_that_python_does_not_read_is_a_wrong_move_and_no_failed_environment(game):
    episode = load("textarena", {"game": game}).open(rows(game, 1)[0], 0)
    assert not episode.step(Turn(0, f"[1 {'9' * 5000}]")).done


def test_rows_of_another_game_and_unknown_games_are_refused():
    environment = load("textarena", {"game": "LightsOut"})
    with pytest.raises(EnvironmentFault, match="the row shows another game; use the same options"):
        environment.open(rows("LightsOut", 1, size=3)[0], 0)
    with pytest.raises(ValueError, match="game='Wordle' is not one of FrozenLake"):
        load("textarena", {"game": "Wordle"})
    with pytest.raises(ValueError, match="unexpected keyword argument 'sise'"):
        load("textarena", {"game": "LightsOut", "sise": 3})


def test_nothing_of_the_package_but_the_game_is_imported():
    code = (
        "import sys; from recipes.environments.textarena import rows; rows('FrozenLake', 1);"
        "print({m.split('.')[0] for m in sys.modules} & {'nltk', 'openai', 'websockets'},"
        "sorted(m for m in sys.modules if m.startswith('textarena.envs.')))"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60)
    assert out == "set() ['textarena.envs.FrozenLake', 'textarena.envs.FrozenLake.env']\n"
