"""How small things in a row, such as lines, are put together to blocks of one size."""

from __future__ import annotations

import attrs

from accelx.data.formats.format import RUN, Block


@attrs.define
class Runs:
    """Blocks of about RUN bytes, made as rows come."""

    blocks: list[Block] = attrs.field(factory=list[Block])
    start: int = -1  # of the block that is being made; -1 for none
    stop: int = 0
    rows: int = 0

    def add(self, start: int, stop: int) -> None:
        """One more row, at these bytes; those between it and the last are no row's."""
        if self.start < 0:
            self.start, self.rows = start, 0
        self.stop = stop
        self.rows += 1
        if stop - self.start >= RUN:
            self.cut()

    def cut(self) -> None:
        """End the block here."""
        if self.start >= 0:
            size = self.stop - self.start
            self.blocks.append(Block(self.start, self.stop, self.rows, size))
        self.start = -1
