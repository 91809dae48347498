"""Whether any rank has raised its hand, known to all of them at the same boundary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

from accelx.comm_wire import dist

if TYPE_CHECKING:
    from accelx.records import Env


@attrs.define(eq=False)
class Flag:
    """A hand that ranks may raise, looked at once a boundary by all of them.

    The answer is that of the boundary before, which has travelled meanwhile: a look
    waits for nothing that is not there. It goes over a gloo group of its own, on the
    CPU, so that it comes between no collectives of the training and stops no GPU.
    """

    env: Env
    group: Any = None
    work: Any = None
    sent: Any = None  # () int32, 1 where a hand was up; one, held while it travels

    def look(self, mine: bool) -> bool:
        """Whether a hand was up at the boundary before; on one rank: at this one.

        A collective: every rank must look equally often.
        """
        if self.env.world == 1:
            return mine
        if self.group is None:
            self.group = dist().new_group(backend="gloo")
        if self.work is not None:
            self.work.wait()
            if int(self.sent):
                return True
        self._send(mine)
        return False

    def _send(self, mine: bool) -> None:
        import torch

        if self.sent is None:
            self.sent = torch.empty((), dtype=torch.int32)
        self.sent.fill_(int(mine))
        most = dist().ReduceOp.MAX
        self.work = dist().all_reduce(self.sent, most, group=self.group, async_op=True)
