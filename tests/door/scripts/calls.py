"""`calls.py CASE ...`: calls spawn from a program, and says what came of each call."""

import os
import sys
import threading
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


def late():
    """A time limit; a longer one where rank 0 could not return in it."""
    for limit in (10, 30, 90):
        try:
            return ax.spawn(slow, n=2, timeout=limit)
        except ax.SpawnError as error:
            found = error
            if "but rank 1 had" in str(error):
                break
    raise found


def unsendable():
    """A result that cannot travel."""
    return threading.Lock()


def local():
    """A function that is in no module, around an object of the program's own type."""
    mine = Answer(5)
    return lambda: (Answer(mine.rank + 1), threading)


CASES = {
    "good": lambda: ax.spawn(good, 1, n=2),
    "bad": lambda: ax.spawn(bad, n=2),
    "slow": late,
    "local": lambda: ax.spawn(local(), n=1),
    "lock": lambda: ax.spawn(local, threading.Lock(), n=2),
    "unsendable": lambda: ax.spawn(unsendable, n=1),
    "none": lambda: ax.spawn(bad, n=0),
}


def say(case):
    """What came of one call, under its name."""
    print(f"== {case}")
    try:
        results = CASES[case]()
        if case == "local":
            print([(type(a) is Answer, a.rank, m is threading) for a, m in results])
        else:
            print([(t.item(), type(a) is Answer, a.rank) for t, a in results])
    except ax.SpawnError as error:
        print("SpawnError:", error)
    except LookupError as error:
        print(f"{type(error).__name__}: {error}, from {error.__cause__!r}")


if __name__ == "__main__":
    for case in sys.argv[1:]:
        say(case)
