"""Tools and an environment as TRL's documentation writes them."""

from __future__ import annotations


def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product of the two integers.
    """
    return a * b


class IncrementEnv:
    def reset(self, **kwargs) -> str | None:
        self.counter = int(kwargs.get("start", 0))
        return kwargs.get("says")

    def increment(self, step: int) -> int:
        """
        Increment the internal counter.

        Args:
            step: Value to add to the counter.

        Returns:
            The updated counter value.
        """
        self.counter += step
        return self.counter

    def get_reward(self) -> float:
        return float(self.counter == 5)


class KeepsMore(IncrementEnv):
    def reset(self, **kwargs) -> None:
        super().reset(**kwargs)
        self.lock = object()


class KeepsNumbers(IncrementEnv):
    def reset(self, **kwargs) -> None:
        super().reset(**kwargs)
        self.board = {1: "x"}
