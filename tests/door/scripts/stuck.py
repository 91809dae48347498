"""Rank 0 fails; the others neither notice nor heed SIGTERM."""

import os
import signal
import sys
import time

signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdout.write(f"{os.getpid()}\n")
sys.stdout.flush()
if os.environ["RANK"] == "0":
    raise ValueError("rank 0 has had enough")
time.sleep(600)
