"""`preempted.py URL PHASE OUT`: trains for two epochs, and says when a phase begins.

PHASE is where each rank waits for a signal: train, evaluate, save (beside the
training), stuck (no boundary comes after it either), or none. The losses go to OUT.
"""

import json
import os
import select
import signal
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
came, number = os.pipe()  # of a signal, told by the kernel's own call: in any thread
os.set_blocking(number, False)
signal.set_wakeup_fd(number)
told = threading.Event()


def linger():
    """Say once that a signal may come, and wait until one has."""
    if not told.is_set():
        told.set()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
    select.select([came], [], [])


def slowly(store, name, parts, size):
    """A store that takes its time, when a thread writes to it."""
    if threading.current_thread() is not threading.main_thread():
        linger()
        time.sleep(0.5)  # so that the ranks leave while it writes
    REAL(store, name, parts, size)


def main():
    env = ax.connect()
    tx = saving.chain(
        env,
        "fsdp2",
        ax.load_state(env, url, missing="fresh"),
        ax.save_state(env, url, every=AT, wait=phase != "save"),
        ax.on_preempt(env, url, grace=0.7 if phase == "stuck" else None),
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
        if phase == "save":
            time.sleep(0.1)  # so that the save is still under way at the next steps
        if state.step != AT + 1:
            continue
        if phase in ("train", "stuck"):
            linger()
        if phase == "stuck":
            time.sleep(600)
        if phase == "evaluate":
            for held_out in ax.feed(tx, saving.loader()):
                judge(state, held_out)
                linger()


if __name__ == "__main__":
    main()
