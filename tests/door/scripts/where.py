"""Says as JSON where each rank finds itself, and which addresses it listens on."""

import atexit
import contextlib
import json
import os
import random
import socket
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist


def sockets(pid):
    """Inodes of the sockets that a process holds."""
    links = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            links.append(str(path.readlink()))
    return {link[8:-1] for link in links if link.startswith("socket:[")}


def listening(pids):
    """Addresses, in the kernel's notation, that these processes listen on."""
    inodes = set().union(*map(sockets, pids))
    rows = [
        line.split()
        for pid in pids  # each may be in a network namespace of its own
        for file in ("tcp", "tcp6")
        for line in Path(f"/proc/{pid}/net/{file}").read_text().splitlines()[1:]
    ]
    return sorted({r[1].split(":")[0] for r in rows if r[3] == "0A" and r[9] in inodes})


def say(what):
    """One line, in one piece."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main():
    """Meet the others, then look around."""
    dist.init_process_group("gloo")
    pids = [None] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())
    found = listening([*pids, os.getppid()])
    dist.barrier()
    with socket.create_server(("", 0)):
        control = listening([os.getpid()])
    atexit.register(say, {"farewell": __name__})
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELX_LAUNCHER")
    here = {
        "name": __name__,
        "main": sys.modules["__main__"].__dict__ is globals(),
        "argv": sys.argv,
        "path": sys.path[0],
        "variables": [os.environ[name] for name in names],
        "threads": torch.get_num_threads(),
        "cpus": sorted(os.sched_getaffinity(0)),
        "random": [random.random(), float(np.random.rand())],
        "listening": found,
        "control": control,
        "stdin": os.fstat(0).st_ino,
    }
    say(here)
    dist.destroy_process_group()


if __name__ == "__main__":
    unclosed = Path(os.environ["UNCLOSED"] + os.environ["RANK"]).open("w")  # noqa: SIM115
    unclosed.write("written, never flushed")
    main()
