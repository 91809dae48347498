"""`tasks.py srun|openmpi [options] command`: two ranks here, as that launcher has them.

Stands for `srun` and `mpirun` on a machine without them: the same variables, both
processes started at once, the highest exit code. With SEND=USR1 in the environment, all
ranks get that signal after the second line of output, as before a time limit; rank 0
writes no further line before it has come.
"""

import os
import runpy
import select
import signal
import sys
from pathlib import Path

import accelx as ax

RANKS = 2


def variables(kind, rank):
    """What the launcher tells a rank of two on one node."""
    if kind == "srun":
        return {
            "SLURM_STEP_ID": "0",
            "SLURM_NTASKS": str(RANKS),
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0",
            "SLURM_NNODES": "1",
            "SLURM_STEP_NUM_TASKS": str(RANKS),
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_STEP_TASKS_PER_NODE": str(RANKS),
            "SLURM_STEP_NODELIST": "node1",
        }
    return {
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": str(RANKS),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(RANKS),
        "PMIX_NAMESPACE": f"test-{os.getpid()}",
    }


class Held:
    """An output that waits after its second line until a signal has come."""

    def __init__(self, stream):
        self.stream, self.lines = stream, 0
        self.came, number = os.pipe()
        os.set_blocking(number, False)
        signal.set_wakeup_fd(number)

    def write(self, text):
        """Count the lines."""
        self.lines += text.count("\n")
        return self.stream.write(text)

    def flush(self):
        """Pass on what was written, and wait."""
        self.stream.flush()
        if self.lines == 2:
            select.select([self.came], [], [])


def started(kind, rank, words):
    """(pid, output) of one rank: rank 0's is for us to read, the other's is ours."""
    read, write = os.pipe()
    pid = os.fork()  # torch is imported, once for all ranks
    if pid:
        os.close(write)
        return pid, read
    if rank == 0:
        os.dup2(write, sys.stdout.fileno())
        if os.environ.get("SEND"):
            sys.stdout = Held(sys.stdout)
    os.environ |= {**variables(kind, rank), "GLOO_SOCKET_IFNAME": "lo"}
    sys.argv, sys.path[0] = [*words], str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")
    return sys.exit()


def main(kind, *words):
    """Start the ranks. Options are those before the program, `python`."""
    words = words[words.index("python") + 1 :]
    ranks = [started(kind, rank, words) for rank in range(RANKS)]
    for number, line in enumerate(os.fdopen(ranks[0][1])):
        sys.stdout.write(line)
        if number == 1 and os.environ.get("SEND"):
            for pid, _ in ranks:
                os.kill(pid, signal.Signals[f"SIG{os.environ['SEND']}"])
    ends = [os.waitpid(pid, 0)[1] for pid, _ in ranks]
    return max(os.waitstatus_to_exitcode(end) % 256 for end in ends)


[getattr(ax, name) for name in ax.__all__]  # imports them, before any fork
sys.exit(main(*sys.argv[1:]))
