"""`signals.py HOW`: waits for signals, and says how many of which came."""

import os
import signal
import sys
import time

came = []
how = sys.argv[1]


def remember(number, frame):
    """Note the signal."""
    came.append(signal.Signals(number).name)


if how != "default":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, remember)
print("ready", os.getpid(), flush=True)
while how in ("default", "ignore") or not {"SIGINT", "SIGTERM"} & set(came):
    time.sleep(0.02)
time.sleep(0.3)  # for a second one, which must not come
print("got", *came, flush=True)
if how == "choose":
    sys.exit(5)
