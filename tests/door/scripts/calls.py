"""`calls.py CASE`: calls spawn from a program, and says what came of it."""

import os
import sys
import time

import accelx as ax


class Answer:
    """A type of this very program."""

    def __init__(self, rank):
        self.rank = rank


def good(shift):
    """What travels: a tensor, and an object of the program's own type."""
    import torch

    env = ax.connect()
    total = ax.reduce(env, torch.tensor([float(env.rank)]))
    return total + shift, Answer(env.rank)


def bad():
    """Rank 1 fails."""
    if os.environ["RANK"] == "1":
        raise LookupError("nothing under that name")


def slow():
    """Rank 1 takes long."""
    time.sleep(600 * int(os.environ["RANK"]))


def unsendable():
    """A result that cannot travel."""
    return lambda: 0


CASES = {
    "good": lambda: ax.spawn(good, 1, n=2),
    "bad": lambda: ax.spawn(bad, n=2),
    "slow": lambda: ax.spawn(slow, n=2, timeout=8),
    "lambda": lambda: ax.spawn(lambda: 0, n=2),
    "unsendable": lambda: ax.spawn(unsendable, n=1),
    "none": lambda: ax.spawn(bad, n=0),
}

if __name__ == "__main__":
    try:
        results = CASES[sys.argv[1]]()
        print([(t.item(), type(a) is Answer, a.rank) for t, a in results])
    except ax.SpawnError as error:
        print("SpawnError:", error)
