"""`ends.py WAY RANK`: one rank ends in a bad way, the others wait for it."""

import ctypes
import os
import signal
import subprocess
import sys

import torch.distributed as dist

WAYS = {
    "raise": lambda: 1 / 0,
    "exit": lambda: sys.exit(3),
    "words": lambda: sys.exit("no data in here"),
    "_exit": lambda: os._exit(7),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "fault": lambda: ctypes.string_at(0),
    "early": lambda: sys.exit(0),
}

dist.init_process_group("gloo")
dist.barrier()  # so that no rank is still connecting
if dist.get_rank() == int(sys.argv[2]):
    if sys.argv[1] != "early":
        child = subprocess.Popen(["sleep", "600"])
        print(child.pid, flush=True)
    WAYS[sys.argv[1]]()
dist.barrier()
