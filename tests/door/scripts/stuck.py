"""Rank 0 fails; the others neither notice nor heed SIGTERM."""

import os
import signal
import time

signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
if os.environ["RANK"] == "0":
    raise ValueError("rank 0 has had enough")
time.sleep(600)
