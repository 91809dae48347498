"""Calls spawn where every import of this file does it again."""

import accelx as ax


def work():
    """Nothing."""


ax.spawn(work, n=2)
