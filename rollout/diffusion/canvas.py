"""The rows that share a model call: the host's plan for each, and their canvases on the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from rollout.diffusion.model import Denoiser, KeyValues, Layout, upload
from rollout.diffusion.steps import (
    Candidates,
    DenoisingParams,
    candidates,
    chosen,
    guided,
    transfer_schedule,
)

GIVEN, UNWRITTEN = -1, -2
CHUNK_BYTES = {"cpu": 64 << 20}


@dataclass(eq=False)
class Row:
    """A canvas as the host knows it.

    Attributes:
        slot: its row in the device's rectangle; -1 while it waits.
        tail: first column after all given tokens; only an end token from there on ends the row.
        blocks: [first column, end, masks in between] of the blocks left to fill; the first one is active.
        schedule: tokens to commit at each of the active block's next steps.
        age: steps since keys and values of the whole row were computed; None: never, in this block.
    """

    index: int
    token_ids: Sequence[int]
    seed: int
    tail: int
    blocks: deque[list[int]]
    schedule: deque[int]
    slot: int = -1
    num_steps: int = 0
    age: int | None = None

    @staticmethod
    def of(
        index: int, token_ids: Sequence[int], *, seed: int, params: DenoisingParams, model: Denoiser
    ) -> Row:
        mask = model.mask_token_id
        masked = [c for c, token in enumerate(token_ids) if token == mask]
        if not masked:
            raise ValueError(
                f"canvas {index} holds no mask token ({mask}), so there is nothing to fill; put it where "
                "text is wanted"
            )
        if model.context_length is not None and len(token_ids) > model.context_length:
            raise ValueError(
                f"canvas {index} has {len(token_ids)} tokens, {masked[0]} of them before the first mask, and "
                f"the model's context holds {model.context_length}; shorten the prompt or gen_length by "
                f"{len(token_ids) - model.context_length}"
            )
        if model.shift and masked[0] == 0:
            raise ValueError(
                f"canvas {index} begins with a mask, but a model with shifted outputs has no column to "
                "predict it from; begin the prompt with a token"
            )
        blocks = deque()
        for low in range(masked[0], masked[-1] + 1, params.block_length):
            high = min(low + params.block_length, len(token_ids))
            if count := sum(low <= c < high for c in masked):
                blocks.append([low, high, count])
        tail = max((c + 1 for c, token in enumerate(token_ids) if token != mask), default=0)
        schedule = deque(transfer_schedule(blocks[0][2], params.steps_per_block))
        return Row(index, token_ids, seed, tail, blocks, schedule)

    @property
    def length(self) -> int:
        return len(self.token_ids)

    def computed(self, params: DenoisingParams, *, shift: bool) -> tuple[int, int]:
        """[low, high): the columns whose hidden states the next step computes."""
        low, high, _ = self.blocks[0]
        old = self.age is None or (params.refresh_every > 0 and self.age >= params.refresh_every)
        if params.cache == "none" or old:
            return 0, self.length
        return low - shift, high if params.cache == "dual" else self.length

    def advance(self, num_left: int, params: DenoisingParams) -> bool:
        """Notes a step that left `num_left` masks in the active block; returns whether the block ended."""
        self.num_steps += 1
        self.blocks[0][2] = num_left
        if num_left:
            return False
        self.blocks.popleft()
        self.age = None
        if self.blocks:
            self.schedule = deque(transfer_schedule(self.blocks[0][2], params.steps_per_block))
        return True


@dataclass(frozen=True)
class State:
    """Canvases on the device, changed in place by `Batch`.

    `steps_RT` holds the step at which a token was committed, or GIVEN, or UNWRITTEN.
    """

    ids_RT: Int[Tensor, "R T"]
    masked_RT: Bool[Tensor, "R T"]
    given_RT: Bool[Tensor, "R T"]
    steps_RT: Int[Tensor, "R T"]
    logprobs_RT: Float[Tensor, "R T"]
    seeds_R: Int[Tensor, " R"]
    finite_R: Bool[Tensor, " R"]

    @staticmethod
    def of(rows: Sequence[Row], width: int, *, mask_token_id: int, device: torch.device) -> State:
        padded = np.full((len(rows), width), mask_token_id, dtype=np.int64)
        real = np.zeros_like(padded, dtype=bool)
        for r, row in enumerate(rows):
            padded[r, : row.length] = row.token_ids
            real[r, : row.length] = True
        masked = real & (padded == mask_token_id)
        return State(
            ids_RT=upload(padded, device),
            masked_RT=upload(masked, device),
            given_RT=upload(real & ~masked, device),
            steps_RT=upload(np.where(masked, UNWRITTEN, GIVEN), device),
            logprobs_RT=torch.zeros(padded.shape, dtype=torch.float64, device=device),
            seeds_R=upload(np.array([row.seed for row in rows], dtype=np.int64), device),
            finite_R=torch.ones(len(rows), dtype=torch.bool, device=device),
        )

    def only(self, slots: Sequence[int]) -> State:
        index = upload(np.array(slots, dtype=np.int64), self.ids_RT.device)
        return replace(self, **{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def with_rows(self, new: State) -> State:
        """These rows followed by the new ones, all padded or cut to the width of the new ones."""

        def joined(old: Tensor, more: Tensor) -> Tensor:
            if more.ndim == 2:  # negative padding cuts
                old = pad(old, (0, more.shape[1] - old.shape[1]))
            return torch.cat([old, more])

        return State(*(joined(getattr(self, f.name), getattr(new, f.name)) for f in fields(self)))

    def read(self, slots: Sequence[int]) -> Iterator[tuple[list[int], list[int], list[float], bool]]:
        """Ids, steps and log-probs of rows, and whether they are finite; waits for the device."""
        rows = self.only(slots)
        found = (rows.ids_RT, rows.steps_RT, rows.logprobs_RT, rows.finite_R)
        return zip(*(tensor.tolist() for tensor in found), strict=True)


class Batch:
    """Steps a changing set of rows: callers append to `rows` what joins; `step` removes what is done."""

    state: State

    def __init__(self, model: Denoiser, params: DenoisingParams) -> None:
        self.model, self.params, self.device = model, params, model.device
        self.rows: list[Row] = []
        self.kept = KeyValues() if params.cache != "none" else None
        # With guidance every row has a twin whose given tokens are masked.
        self.copies = 2 if params.cfg_scale else 1
        barred = [model.mask_token_id, *params.suppress_token_ids]
        self.barred = torch.tensor(barred, device=self.device)
        self.stops = torch.tensor(params.stop_token_ids, dtype=torch.int64, device=self.device)
        self.held: list[Row] = []
        self.chunk = 16
        self.layout: tuple[list[tuple[int, int]], Layout] | None = None

    def step(self) -> list[Row]:
        """Makes a model call; returns the rows that it finished. `state` keeps those until the next call."""
        self._settle()
        layout = self._layout()
        hidden_ND = self.model.hidden(self._inputs()[layout.rows_N, layout.columns_N], layout)
        left = self._commit(hidden_ND, layout)
        ended = [row for row, n in zip(self.rows, left, strict=True) if row.advance(n, self.params)]
        stopped = self._stopped(ended)
        finished = [row for row, stops in zip(ended, stopped, strict=True) if stops or not row.blocks]
        self.rows = [row for row in self.rows if row not in finished]
        return finished

    def _settle(self) -> None:
        """Packs the rows that stay, followed by those that joined."""
        if [row.index for row in self.rows] == [row.index for row in self.held]:
            return
        staying = [row.slot for row in self.rows if row.slot >= 0]
        new = [row for row in self.rows if row.slot < 0]
        old_shape = (len(self.held), self.state.ids_RT.shape[1]) if self.held else (0, 0)
        width = max(row.length for row in self.rows)
        joining = State.of(new, width, mask_token_id=self.model.mask_token_id, device=self.device)
        self.state = self.state.only(staying).with_rows(joining) if staying else joining
        if self.kept is not None:
            copies = self.copies
            kept = [slot * copies + copy for slot in staying for copy in range(copies)]
            old = (old_shape[0] * copies, old_shape[1])
            self.kept.select(kept, num_rows=len(self.rows) * copies, old=old, width=width)
        for slot, row in enumerate(self.rows):
            row.slot = slot
        self.held, self.layout = list(self.rows), None

    def _layout(self) -> Layout:
        ranges = [row.computed(self.params, shift=self.model.shift) for row in self.rows]
        for row, (low, high) in zip(self.rows, ranges, strict=True):
            row.age = 1 if row.age is None or (low, high) == (0, row.length) else row.age + 1
        if self.layout is None or self.layout[0] != ranges:
            twice = [x for x in ranges for _ in range(self.copies)]
            lengths = [row.length for row in self.rows for _ in range(self.copies)]
            self.layout = (ranges, Layout.of(twice, lengths, device=self.device, kept=self.kept))
        return self.layout[1]

    def _inputs(self) -> Int[Tensor, "P T"]:
        ids_RT = self.state.ids_RT
        if self.copies == 1:
            return ids_RT
        blind_RT = ids_RT.masked_fill(self.state.given_RT, self.model.mask_token_id)
        return torch.stack([ids_RT, blind_RT], dim=1).flatten(0, 1)

    def _commit(self, hidden_ND: Tensor, layout: Layout) -> list[int]:
        """Draws a token for each masked column of active blocks, keeps the surest; returns masks left by row.

        M is the most masks that a row has left in its block, L their sum over rows.
        """
        state, num_masked = self.state, [row.blocks[0][2] for row in self.rows]
        low_R, high_R, counts_R, steps_R, rows_L, ranks_L = self._plan(num_masked)
        window_RW = low_R[:, None] + torch.arange(self.params.block_length, device=self.device)
        inside_RW = window_RW < high_R[:, None]
        window_RW = window_RW.clamp(max=state.ids_RT.shape[1] - 1)
        open_RW = state.masked_RT.gather(1, window_RW) & inside_RW
        # Sorts the masked columns to the front, without asking the device how many there are.
        order_RM = open_RW.int().sort(dim=1, descending=True, stable=True).indices[:, : max(num_masked)]
        columns_L = window_RW.gather(1, order_RM)[rows_L, ranks_L]

        found = self._candidates(
            hidden_ND, layout, rows_L=rows_L, columns_L=columns_L, steps_L=steps_R[rows_L]
        )
        place = (rows_L, ranks_L)
        scores_RM = found.scores_L.new_full(order_RM.shape, -torch.inf).index_put(place, found.scores_L)
        probs_RM = found.probs_L.new_zeros(order_RM.shape).index_put(place, found.probs_L)
        taken_L = chosen(scores_RM, probs_RM, counts_R, self.params.threshold)[place]

        at = (rows_L, columns_L)
        state.ids_RT[at] = torch.where(taken_L, found.tokens_L, state.ids_RT[at])
        state.steps_RT[at] = torch.where(taken_L, steps_R[rows_L], state.steps_RT[at])
        state.logprobs_RT[at] = torch.where(taken_L, found.logprobs_L, state.logprobs_RT[at])
        state.masked_RT[at] = ~taken_L
        faults_R = torch.zeros_like(steps_R).index_add(0, rows_L, (~found.finite_L).long())
        state.finite_R.logical_and_(faults_R == 0)
        if self.params.threshold is None:
            return [n - row.schedule.popleft() for n, row in zip(num_masked, self.rows, strict=True)]
        return (state.masked_RT.gather(1, window_RW) & inside_RW).sum(1).tolist()

    def _plan(self, num_masked: Sequence[int]) -> list[Tensor]:
        """Per row: first column and end of the active block, tokens to commit, step. Per masked column: its
        row and rank. All of it is one upload.
        """
        per_row = [
            (row.blocks[0][0], row.blocks[0][1], row.schedule[0] if row.schedule else 1, row.num_steps)
            for row in self.rows
        ]
        counts = np.array(num_masked)
        rows = np.repeat(np.arange(len(counts)), counts)
        ranks = np.arange(counts.sum()) - (np.cumsum(counts) - counts)[rows]
        flat = upload(np.concatenate([np.array(per_row, dtype=np.int64).T.ravel(), rows, ranks]), self.device)
        sizes = [len(self.rows)] * 4 + [len(rows)] * 2
        return list(flat.split(sizes))

    def _candidates(
        self, hidden_ND: Tensor, layout: Layout, *, rows_L: Tensor, columns_L: Tensor, steps_L: Tensor
    ) -> Candidates:
        """Works in chunks: logits and their float64 copies never exist for all rows of a large batch."""
        sources_L = columns_L - int(self.model.shift)
        index_L = layout.offsets_R[rows_L * self.copies] + sources_L
        blind_L = layout.offsets_R[rows_L * self.copies + self.copies - 1] + sources_L
        seeds_L = self.state.seeds_R[rows_L]
        pieces: list[Candidates] = []
        start = 0
        while start < len(rows_L):
            part = slice(start, start + self.chunk)
            logits_LV = self.model.logits(hidden_ND[index_L[part]])
            if self.copies == 2:
                blind_LV = self.model.logits(hidden_ND[blind_L[part]])
                logits_LV = guided(logits_LV, blind_LV, self.params.cfg_scale)
            logits_LV = logits_LV.index_fill(1, self.barred, -torch.inf)
            drawn_by = {"seeds_L": seeds_L[part], "steps_L": steps_L[part], "columns_L": columns_L[part]}
            pieces.append(candidates(logits_LV, self.params, **drawn_by))
            start += self.chunk
            self.chunk = max(1, CHUNK_BYTES.get(self.device.type, 512 << 20) // (8 * logits_LV.shape[1]))
        return Candidates(*(torch.cat([getattr(p, f.name) for p in pieces]) for f in fields(Candidates)))

    def _stopped(self, ended: Sequence[Row]) -> list[bool]:
        """Whether a row that completed a block holds an end token in its open tail; waits for the device."""
        if not ended or not self.params.stop_token_ids:
            return [False] * len(ended)
        tails_R = upload(np.array([row.tail for row in self.held]), self.device)
        columns_T = torch.arange(self.state.ids_RT.shape[1], device=self.device)
        found_RT = torch.isin(self.state.ids_RT, self.stops) & (columns_T >= tails_R[:, None])
        stopped = (found_RT & ~self.state.masked_RT).any(1).tolist()
        return [stopped[row.slot] for row in ended]
