"""Rank 0 fails; the others neither notice nor heed SIGTERM."""

import os
import signal
import sys
import time

import torch.distributed as dist

signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdout.write(f"{os.getpid()}\n")
sys.stdout.flush()
dist.init_process_group("gloo")
dist.barrier()  # from here on none can be told to end
if os.environ["RANK"] == "0":
    raise ValueError("rank 0 has had enough")
time.sleep(600)
