"""In which order rows of files are read, so that each block has one reader.

A block is what is read at once: a Parquet row group, a record batch, a run of lines.
Shuffled, an epoch is first a *sequence* of all rows: the blocks permuted, and the rows
within each. A batch then does not take its rows from one place of the sequence: its
slots are cut into lanes and the steps into turns, and each pair of lane and turn goes
through a segment of the sequence of its own. Ranks hold neighbouring slots and workers
every so many steps, so a rank's worker meets only the blocks of its segments, and yet
the global batch depends on neither.

Order version 1, fixed by golden values in the tests; `key` and `hashed` are those of
permutation.py, B is the batch size, F the number of full batches:

    blocks      permute(blocks, key(201, seed) as signed, epoch)
    rows        base[block] = hashed(key(202, seed, epoch), block); up to 4096 rows by
                hashed(0, row + base[block]) as signed numbers, ascending; more by
                permute(rows, base[block], 0)
    sequence    all rows so, turned left by key(203, seed, epoch) mod their number: each
                row stands at each place equally often, whatever its block's size
    lanes, L    lane l has the slots from l B // L
    turns, T    turn t has the steps i with i mod T = t
    segments    by lane, then by (t mod 2, t mod 4, t), each as long as its rows; rows
                by step, then by slot. The short batch at the end takes what is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import attrs
import torch
from torch import Tensor

from accelx.permutation import SORTED, hashed, key, permute

ORDER_VERSION = 1

_BLOCKS, _ROWS, _TURNED = 201, 202, 203
# Both together are the blocks that all readers hold in memory at once. 12 is divided by
# 2, 3, 4 and 6 workers.
LANES, TURNS = 8, 12
SMALLER = ((8, 12), (8, 4), (4, 4), (2, 4), (1, 4))
MEMORY = 2 * 2**30  # bytes of all those blocks, where that many lanes allow it


def _ends(rows: Tensor) -> Tensor:
    return rows.cumsum(0)


@attrs.frozen(eq=False)
class Blocks:
    """How many rows the blocks of a dataset have, in its order."""

    rows: Tensor  # (blocks,) int64, each at least 1
    nbytes: int = 0  # of a block in memory, on average
    ends: Tensor = attrs.field(init=False, repr=False)  # (blocks,) int64

    def __attrs_post_init__(self) -> None:
        object.__setattr__(self, "ends", _ends(self.rows))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0


def locate(blocks: Blocks, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The block of each index, and the row in it: int64, of the same shape."""
    at = torch.searchsorted(blocks.ends, indices, right=True)
    return at, indices - blocks.ends[at] + blocks.rows[at]


def lanes_and_turns(blocks: Blocks, batch_size: int) -> tuple[int, int]:
    """How many of each the order has: fewer where blocks are large, or batches small.

    A function of the dataset and the batch size alone, as the order is.
    """
    most = MEMORY // max(1, blocks.nbytes)
    fits = (pair for pair in SMALLER if pair[0] * pair[1] <= most)
    lanes, turns = next(fits, SMALLER[-1])
    return min(lanes, batch_size), turns


def order_at(
    blocks: Blocks, positions: Tensor, *, seed: int, epoch: int, batch_size: int
) -> Tensor:
    """The indices at `positions` of a shuffled epoch: int64, of the same shape.

    Law: over all positions each index comes once. Takes time and memory of the
    positions and of the blocks that they lie in.
    """
    lanes, turns = lanes_and_turns(blocks, batch_size)
    flat = positions.reshape(-1)
    n = len(blocks)
    q = segments(n, batch_size, lanes, turns, flat) + key(_TURNED, seed, epoch) % n
    q = q % n
    return _shuffled(blocks, seed, epoch, q).view(positions.shape)


def segments(n: int, batch_size: int, lanes: int, turns: int, p: Tensor) -> Tensor:
    """Where in the sequence of all `n` rows position `p` of the epoch reads."""
    full = n // batch_size
    step, slot = p.div(batch_size, rounding_mode="floor"), p % batch_size
    lane = ((slot + 1) * lanes - 1).div(batch_size, rounding_mode="floor")
    first = (lane * batch_size).div(lanes, rounding_mode="floor")
    after = ((lane + 1) * batch_size).div(lanes, rounding_mode="floor")
    before = torch.tensor(_steps_before(full, turns))[step % turns]
    steps = before + step.div(turns, rounding_mode="floor")
    q = first * full + (after - first) * steps + slot - first
    return torch.where(step < full, q, p)


def _steps_before(full: int, turns: int) -> list[int]:
    """For each turn, the steps of the turns that stand before it in a lane.

    Turns of one worker stand together, for 2 and 4 workers: where blocks are longer
    than segments, it meets fewer of them.
    """
    before, total = [0] * turns, 0
    for t in sorted(range(turns), key=lambda t: (t % 2, t % 4, t)):
        before[t] = total
        total += max(0, -(-(full - t) // turns))
    return before


def _shuffled(blocks: Blocks, seed: int, epoch: int, q: Tensor) -> Tensor:
    """The index of row `q` of the sequence before it is turned."""
    order, ends = _sequence(blocks, seed, epoch)
    at = torch.searchsorted(ends, q, right=True)
    block = order[at]
    rows = blocks.rows[block]
    row = q - ends[at] + rows
    return blocks.ends[block] - rows + _permuted(blocks, seed, epoch, block, row)


@lru_cache(maxsize=4)
def _sequence(blocks: Blocks, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """The blocks of an epoch in their order, and the rows up to each one's end."""
    n = len(blocks.rows)
    own = _signed(key(_BLOCKS, seed))
    order = permute(n, own, epoch, torch.arange(n))
    return order, blocks.rows[order].cumsum(0)


def _permuted(
    blocks: Blocks, seed: int, epoch: int, block: Tensor, row: Tensor
) -> Tensor:
    """For each pair of a block and a row of it, the row that stands there."""
    touched, which = block.unique(return_inverse=True)
    rows, base = blocks.rows[touched], hashed(key(_ROWS, seed, epoch), touched)
    out = row.clone()
    small = rows <= SORTED
    if small.any():
        here = small[which]
        order, starts = _sorted(rows[small], base[small])
        number = small.cumsum(0) - 1  # of a small block among the small ones
        out[here] = order[starts[number[which[here]]] + row[here]]
    for one, here in _each(which, ~small):
        out[here] = permute(int(rows[one]), int(base[one]), 0, row[here])
    return out


def _each(which: Tensor, wanted: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The wanted values of `which`, and where each of them stands."""
    here = wanted[which].nonzero().view(-1)
    here = here[which[here].argsort(stable=True)]
    values, counts = which[here].unique_consecutive(return_counts=True)
    yield from zip(values.tolist(), here.split(counts.tolist()), strict=True)


def _sorted(rows: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of many blocks, each block's sorted by hash, and where each begins."""
    starts = rows.cumsum(0) - rows
    which = torch.arange(len(rows)).repeat_interleave(rows)
    row = torch.arange(len(which)) - starts[which]
    by_hash = hashed(0, row + base[which]).argsort(stable=True)
    by_block = which[by_hash].argsort(stable=True)
    return row[by_hash[by_block]], starts


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
