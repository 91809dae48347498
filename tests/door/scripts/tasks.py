"""`tasks.py srun|openmpi [options] command`: two ranks here, as that launcher has them.

Stands for `srun` and `mpirun` on a machine without them: the same variables, both
processes started at once, the highest exit code. With SEND=USR1 in the environment, all
ranks get that signal after the second line of output, as before a time limit.
"""

import os
import signal
import subprocess
import sys

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


def started(kind, rank, words):
    """One rank; its output is read by whoever reads ours, rank 0's by us first."""
    more = {**variables(kind, rank), "GLOO_SOCKET_IFNAME": "lo"}
    out = subprocess.PIPE if rank == 0 else None
    return subprocess.Popen(words, env={**os.environ, **more}, stdout=out, text=True)


def main(kind, *words):
    """Start the ranks. Options are those before the program, `python`."""
    words = words[words.index("python") :]
    ranks = [started(kind, rank, words) for rank in range(RANKS)]
    for number, line in enumerate(ranks[0].stdout):
        sys.stdout.write(line)
        if number == 1 and os.environ.get("SEND"):
            for rank in ranks:
                rank.send_signal(signal.Signals[f"SIG{os.environ['SEND']}"])
    return max(rank.wait() % 256 for rank in ranks)


sys.exit(main(*sys.argv[1:]))
