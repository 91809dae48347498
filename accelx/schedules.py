"""Factors of the learning rate over a run, as functions of the step."""

from __future__ import annotations

import math

import attrs

from accelx.records import code


@attrs.frozen(repr=False)
class Curve:
    """A factor over steps: linear up over `warmup`, then down to `floor` at `total`.

    Step k trains with factor (k + 1) / warmup while warming up, so none is lost on 0.
    """

    warmup: int
    total: int
    floor: float = 0.0
    shape: str = attrs.field(default="cosine", repr=False)

    def __attrs_post_init__(self) -> None:
        for name, n in (("warmup", self.warmup), ("total", self.total)):
            if n % 1:  # a part of the run, as others take it; or nan
                raise ValueError(
                    f"a schedule counts updates, got {name}={n}; write a whole number, "
                    f"such as round({n} * {self.total})"
                )
        if not 0 <= self.warmup <= self.total:
            raise ValueError(
                f"a schedule wants 0 <= warmup <= total, got warmup={self.warmup}, "
                f"total={self.total}; write for example warmup_cosine(200, 10_000)"
            )

    def __call__(self, step: int) -> float:
        """The factor of the update after `step` others."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        fall = (
            (1 + math.cos(math.pi * done)) / 2 if self.shape == "cosine" else 1 - done
        )
        return self.floor + (1 - self.floor) * fall

    def __repr__(self) -> str:
        return code(f"warmup_{self.shape}", self)


def warmup_cosine(warmup: int, total: int, floor: float = 0.0) -> Curve:
    """Linear up over `warmup` steps, then half a cosine down to `floor` at `total`.

    A factor of the learning rate for `with_schedule`. Raises ValueError unless
    0 <= warmup <= total. Loshchilov and Hutter 2017 (arXiv:1608.03983).
    """
    return Curve(warmup, total, floor, "cosine")


def warmup_linear(warmup: int, total: int, floor: float = 0.0) -> Curve:
    """Linear up over `warmup` steps, then linear down to `floor` at `total`.

    A factor of the learning rate for `with_schedule`. Raises ValueError unless
    0 <= warmup <= total.
    """
    return Curve(warmup, total, floor, "linear")
