"""`signals.py HOW`: waits for signals, and says how many of which came."""

import os
import signal
import sys
import time

came = []
how = sys.argv[1]


def say(*words):
    """One line, in one piece also where Python does not buffer."""
    sys.stdout.write(" ".join(words) + "\n")
    sys.stdout.flush()


def remember(number, frame):
    """Note the signal."""
    came.append(signal.Signals(number).name)


if how != "default":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, remember)
say("ready", str(os.getpid()))
while how in ("default", "ignore") or not {"SIGINT", "SIGTERM"} & set(came):
    time.sleep(0.02)
time.sleep(0.3)  # for a second one, which must not come
say("got", *came)
if how == "choose":
    sys.exit(5)
