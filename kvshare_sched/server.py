"""Start the stock SGLang server with our defaults filled in, and stop it again.

`fill_defaults` is all that `kvshare serve` adds to SGLang's own command line; `running` starts a server as a
child process for the demo, the benchmarks and the end-to-end tests.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from kvshare_sched.cpu import has_nvidia_gpu
from kvshare_sched.errors import SetupError

SMALL_POOL = ("--max-total-tokens", "60000")  # of the embedded model; SGLang's own choice takes most of the memory
_READY_S = 600  # model load and pool allocation included


def fill_defaults(arguments: Sequence[str]) -> list[str]:
    """SGLang arguments plus our defaults, each only where the user gave none."""
    filled = list(arguments)
    given = {a.split("=")[0] for a in arguments if a.startswith("--")}

    def default(name: str, *value: str) -> None:
        if name not in given:
            filled.extend((name, *value))

    default("--radix-cache-backend", "kvshare")
    default("--enable-metrics")
    if has_nvidia_gpu():
        default("--disable-prefill-cuda-graph")
    else:
        default("--device", "cpu")
        default("--dtype", "float32")
        default("--attention-backend", "kvshare_cpu")
    return filled


def command(arguments: Sequence[str]) -> list[str]:
    """The command line that starts stock SGLang with these arguments."""
    return [sys.executable, "-m", "sglang.launch_server", *arguments]


@contextlib.contextmanager
def running(arguments: Sequence[str], *, env: Mapping[str, str] | None = None, log: Path) -> Iterator[str]:
    """A server on a free port while the block runs; yields its URL. Its output goes to `log`.

    Raises SetupError, with the end of the log, when it does not come up.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as sink:
        process = subprocess.Popen(
            command([*arguments, "--port", str(port)]),
            stdout=sink,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
        try:
            _wait_until_ready(process, url, log)
            yield url
        finally:
            _stop(process)


def _wait_until_ready(process: subprocess.Popen, url: str, log: Path) -> None:
    import requests

    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/health_generate", timeout=60).status_code == 200:
                return
        time.sleep(0.5)
    tail = log.read_text(errors="replace").splitlines()[-30:]
    raise SetupError(
        f"the server did not come up (exit code {process.poll()}); end of {log}:\n"
        + "\n".join(line[:300] for line in tail)
    )


def _stop(process: subprocess.Popen) -> None:
    """End the whole session the server lives in: launcher, scheduler ranks, detokenizer."""
    for sign, patience_s in ((signal.SIGTERM, 15), (signal.SIGKILL, 15)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
