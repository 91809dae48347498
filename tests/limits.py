"""A real limit on the memory of a process that a test has forked."""

import ctypes
import gc
import re
import resource
from pathlib import Path

KIB = 1024
THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


def data():
    """Bytes that the kernel counts against RLIMIT_DATA."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"VmData:\s+(\d+) kB", text)[1]) * KIB


def limit(more):
    """Let this process have so many bytes more than it uses, and no more.

    What earlier tests gave back to the heap, or left for gc, would not count, and is
    taken first.
    """
    gc.collect()  # or fit_batch frees later what earlier tests left
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.mallopt(THRESHOLD, 64 * KIB)  # no heap in pieces counts
    size = 64 * KIB * KIB
    while size >= 64 * KIB:
        before = data()
        block = libc.malloc(size)
        if data() > before:  # nothing so large was free
            libc.free(block)
            size //= 2
    resource.setrlimit(resource.RLIMIT_DATA, (data() + more, -1))
