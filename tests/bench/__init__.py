"""Benchmarks: ours and the peer's in the same run. Importing `recipes` first settles how threads wait."""

import recipes  # noqa: F401
