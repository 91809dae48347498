"""Starts launchers on demand, with torch and accelx imported once for all of them.

Its word is the descriptor of a socket. Each message there is [words, folder,
environment, changes] as JSON with three descriptors: where the launcher writes, where
it complains, and where its number and then its exit code are told. Except that it is
forked, a launcher is as `python -m accelx.spawn` would be, but for the changes: under
"step" the kernel's count of what it ended for want of memory rises by so much at each
asking; "repeat" is in how many seconds a second signal is the same one.
"""

import contextlib
import itertools
import json
import os
import signal
import socket
import sys

import accelx as ax
from accelx.launch import door, kernel, watch
from accelx.launch.tether import die_with

SIZE = 1 << 17  # bytes of a message, at most


def tell(told, number):
    """One line for whoever has asked."""
    os.write(told, f"{number}\n".encode())


def keep(parent, out, errors, told):
    """Fork the launcher and wait for it here; returns in the launcher alone."""
    die_with(parent, signal.SIGKILL)
    keeper, pid = os.getpid(), os.fork()
    if not pid:
        return die_with(keeper, signal.SIGTERM)
    os.close(out)
    os.close(errors)
    tell(told, pid)
    tell(told, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    return os._exit(0)


def become(out, errors, told, folder, environ, changes):
    """Take on the streams, the folder and the variables of a launcher."""
    silent = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((silent, out, errors)):
        os.dup2(file, number)
    for file in (silent, out, errors, told):
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    if "step" in changes:
        counts = itertools.count(3, changes["step"])
        kernel.oom_kills = lambda: next(counts)
    watch.REPEAT = changes.get("repeat", watch.REPEAT)


[getattr(ax, name) for name in ax.__all__]  # imports them
with socket.socket(fileno=int(sys.argv[1])) as link:
    while True:
        message, files, *_ = socket.recv_fds(link, SIZE, 3)
        with contextlib.suppress(ChildProcessError):  # there is none
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not message:
            sys.exit()
        if not os.fork():
            break
        for file in files:
            os.close(file)
keep(os.getppid(), *files)
words, *place = json.loads(message)
become(*files, *place)
sys.exit(door.main(words))
