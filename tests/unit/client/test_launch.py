"""Our defaults appear only where the user gave none; a server can be halted, and ended with all it started."""

import contextlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvshare_sched.client import launch

CPU = {"--device": "cpu", "--dtype": "float32", "--attention-backend": "kvshare_cpu"}


@pytest.fixture(params=[False, True], ids=["cpu", "gpu"])
def gpu(request, monkeypatch):
    monkeypatch.setattr(launch, "has_nvidia_gpu", lambda: request.param)
    return request.param


def value(arguments, name):
    return arguments[arguments.index(name) + 1]


def test_user_arguments_come_first_and_unchanged(gpu):
    mine = ["--model-path", "m", "--tp=2", "--port", "1"]
    assert launch.fill_defaults(mine)[:5] == mine and mine == ["--model-path", "m", "--tp=2", "--port", "1"]


def test_our_backend_and_metrics_everywhere(gpu):
    filled = launch.fill_defaults([])
    assert value(filled, "--radix-cache-backend") == "kvshare" and "--enable-metrics" in filled


def test_cpu_defaults_on_a_machine_without_gpu_only(gpu):
    filled = launch.fill_defaults([])
    if gpu:
        assert not CPU.keys() & set(filled)
    else:
        assert {name: value(filled, name) for name in CPU} == CPU


@pytest.mark.parametrize("form", ["two words", "equals sign"])
@pytest.mark.parametrize("name", ["--radix-cache-backend", *CPU])
def test_what_the_user_says_wins(gpu, name, form):
    mine = [name, "mine"] if form == "two words" else [f"{name}=mine"]
    filled = launch.fill_defaults(mine)
    assert sum(a.split("=")[0] == name for a in filled) == 1 and filled[: len(mine)] == mine


def test_flag_is_not_given_twice(gpu):
    assert launch.fill_defaults(["--enable-metrics"]).count("--enable-metrics") == 1


def test_value_that_looks_like_our_option_is_no_option(gpu):
    assert "--device" not in launch.fill_defaults(["--model-path", "cpu"])[:2]
    assert value(launch.fill_defaults(["--model-path", "dtype"]), "--radix-cache-backend") == "kvshare"


def test_filling_twice_changes_nothing(gpu):
    once = launch.fill_defaults(["--model-path", "m"])
    assert launch.fill_defaults(once) == once


def test_command_starts_stock_sglang():
    assert launch.command(["--x"]) == [sys.executable, "-m", "sglang.launch_server", "--x"]


FAMILY = """
import subprocess, sys, time
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
time.sleep(60)
"""


def test_a_halted_server_stands_still_with_all_its_processes_and_can_be_ended():
    process = subprocess.Popen([sys.executable, "-c", FAMILY], start_new_session=True, stdout=subprocess.PIPE)
    try:
        with process.stdout:
            family = {process.pid, int(process.stdout.readline())}
        found = launch.Launched("http://nowhere", process)
        found.halt()
        _until(lambda: {state(pid) for pid in family} == {"T"})
        with found.awake():
            _until(lambda: "T" not in {state(pid) for pid in family})
        _until(lambda: {state(pid) for pid in family} == {"T"})
    finally:
        launch._stop(process)
    assert process.poll() is not None and {state(pid) for pid in family} == {""}


def state(pid: int) -> str:
    """Linux's letter for it; empty when it is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    return ""


def _until(holds) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "that does not come to pass"
        time.sleep(0.01)
