"""Start the stock SGLang server with our defaults filled in, and stop it again.

`fill_defaults` is all that `kvshare serve` adds to SGLang's own command line; `running` and `launched` start a server
as a child process for the demo, the benchmarks and the end-to-end tests.
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
from dataclasses import dataclass
from pathlib import Path

from kvshare_sched.client.device import has_nvidia_gpu
from kvshare_sched.errors import SetupError

SMALL_POOL = ("--max-total-tokens", "60000")  # of the embedded model; SGLang's own choice takes most of the memory
_READY_S = 600  # model load and pool allocation included
_END_S = 60  # the schedulers may have much memory to give back


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


@dataclass(frozen=True, slots=True)
class Launched:
    """A server that runs in a session of its own."""

    url: str
    process: subprocess.Popen

    def halt(self) -> None:
        """Let all its processes stand still: they keep their memory and use no CPU."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """A halted server runs in this block, and is halted again at its end."""
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            self.halt()


@contextlib.contextmanager
def running(arguments: Sequence[str], *, env: Mapping[str, str] | None = None, log: Path) -> Iterator[str]:
    """The URL of a server that is `launched` while the block runs."""
    with launched(arguments, env=env, log=log) as found:
        yield found.url


@contextlib.contextmanager
def launched(arguments: Sequence[str], *, env: Mapping[str, str] | None = None, log: Path) -> Iterator[Launched]:
    """A server on a free port while the block runs. Its output goes to `log`.

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
            yield Launched(url, process)
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
    """Kill the whole session the server lives in (launcher, scheduler ranks, detokenizer) and wait until it is gone.

    It has nothing to save. Asked politely SGLang takes six seconds, looking for requests and dumps every five.
    """
    deadline = time.monotonic() + _END_S
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
        while time.monotonic() < deadline:
            process.poll()  # else the launcher stays, as a zombie
            os.killpg(process.pid, 0)
            time.sleep(0.02)
