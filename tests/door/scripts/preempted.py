"""`preempted.py URL PHASE OUT`: trains for two epochs, and says when a phase begins.

PHASE is where it lingers, so that a signal comes there: train, evaluate, save (beside
the training), stuck (no boundary comes), or none. The losses go to OUT.
"""

import json
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import accelx as ax
from accelx import storage
from tests import saving
from tests.laws.training import grouped, made, masked

url, phase, out = sys.argv[1:]
AT, STOP = 3, 8  # the step where it lingers, and the last
REAL = storage.write


def say(text):
    """One line, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def slowly(store, name, parts, size):
    """A store that takes its time, when a thread writes to it."""
    if threading.current_thread() is not threading.main_thread():
        say("ready")
        time.sleep(0.5)
    REAL(store, name, parts, size)


def main():
    env = ax.connect()
    tx = saving.chain(
        env,
        "fsdp2",
        ax.load_state(env, url, missing="fresh"),
        ax.save_state(env, url, every=AT, wait=phase != "save"),
        ax.on_preempt(env, url, grace=0.7 if phase == "stuck" else 30),
    )
    if phase == "save":
        storage.write = slowly
    state = ax.init(tx, made(), grouped)
    step, judge, losses = ax.step(tx, masked), ax.measure(tx, masked), []
    for batch in ax.feed(tx, saving.loader(), start=state, stop=STOP):
        state, done = step(state, batch)
        losses.append(float(done.loss))
        if env.main:
            Path(out).write_text(json.dumps([state.step, losses]))
        if phase == "train" and state.step >= AT + 1:
            say("ready")
            time.sleep(0.3)
        if phase == "save":
            time.sleep(0.1)
        if phase == "evaluate" and state.step == AT + 1:
            say("ready")
            for _ in range(50):
                for batch in ax.feed(tx, saving.loader()):
                    judge(state, batch)
                    time.sleep(0.02)
        if phase == "stuck" and state.step == AT + 1:
            say("ready")
            time.sleep(30)


if __name__ == "__main__":
    main()
