"""A Prometheus of our own, for tests and pictures: Debian's binary, in a folder that is thrown away."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import requests
import yaml

HERE = Path(__file__).resolve().parent
_READY_S = 60
_NO_NUMBER = ("NaN", "+Inf", "-Inf")


def binaries() -> Path:
    """The folder of `prometheus` and `promtool`; raises RuntimeError when they are not there and cannot be fetched."""
    found = subprocess.run([HERE.parent / "scripts" / "prometheus.sh"], capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"no Prometheus (scripts/prometheus.sh needs apt-get and a network): {found.stderr[-500:]}")
    return Path(found.stdout.strip())


def free_port() -> int:
    """A port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Prometheus:
    """A Prometheus that is running somewhere."""

    def __init__(self, url: str):
        self.url = url

    def ask(self, path: str, **parameters):
        """The `data` of an API answer; raises RuntimeError with Prometheus' own words when it refuses."""
        answer = requests.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        if answer["status"] != "success":
            raise RuntimeError(f"{path} {parameters}: {answer['error']}")
        return answer["data"]

    def over(self, query: str, start: float, end: float, step: float) -> list[tuple[dict, list[tuple[float, float]]]]:
        """(labels, [(time in seconds, value)]) of every series a query gives, without values that are no numbers."""
        found = self.ask("query_range", query=query, start=start, end=end, step=step)["result"]
        rows = ((r["metric"], [(float(t), float(v)) for t, v in r["values"] if v not in _NO_NUMBER]) for r in found)
        return [(labels, points) for labels, points in rows if points]

    def names(self) -> set[str]:
        """All series names it has seen."""
        return set(self.ask("label/__name__/values"))


@contextlib.contextmanager
def scraping(targets: Sequence[str], folder: Path, *, interval: str = "1s") -> Iterator[Prometheus]:
    """A Prometheus that scrapes these host:port while the block runs, under our rules; its files go to `folder`."""
    config = yaml.safe_load((HERE / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    config["rule_files"] = [str(HERE / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"] = [{"targets": list(targets)}]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        binaries() / "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with open(folder / "prometheus.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(f"http://127.0.0.1:{port}", process)
            yield Prometheus(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            process.wait(30)


def _wait_until_ready(url: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(requests.RequestException):
            if requests.get(f"{url}/-/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"Prometheus did not come up (exit code {process.poll()})")
