"""The operators' own tests once more with Triton's kernels, in its interpreter, where there is no GPU to run them on.

A process of its own: whether Triton interprets is settled when it is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MODULES = ("test_copy_rotate.py", "test_deviation.py", "test_paged_attention.py", "test_gpu_check.py")


@pytest.mark.cpu
def test_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / m) for m in MODULES)]
    few_threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # products of 64 rows: more would only spin
    environment = os.environ | few_threads | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
