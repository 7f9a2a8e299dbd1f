"""Thread counts and wait policy for a CPU server.

Two processes with spinning OpenMP threads slow each other down tenfold on a small machine: the tokenizer,
the scheduler and the detokenizer of one server are three processes. Waiting threads must sleep, and only
the scheduler should compute with more than one. Values set by the user win.
"""

import os


def configure() -> None:
    """Set OpenMP's defaults for this process and those it starts; call before heavy torch work."""
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("KMP_BLOCKTIME", "0")
    os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
