"""Plugin installed, backend not chosen: byte for byte the SGLang it was, same platform, same attention backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from harness import SYSTEMS, chat, sections, start

from kvshare_sched.client import launch as launcher
from kvshare_sched.client import model

DOCS = sections()
WITHOUT_US = {"SGLANG_PLUGINS": "kvshare_cpu"}  # the platform and its attention backend, nothing else of ours
STOCK = ["--radix-cache-backend", ""]


def answers(environment) -> list[str]:
    prompts = [chat(SYSTEMS[0], DOCS[:3]), chat(SYSTEMS[1], [DOCS[2], DOCS[0], DOCS[1]]), "Hello"]
    with start(f"untouched-{len(environment)}", STOCK, environment) as server:
        found = []
        for prompt in prompts:
            body = server._body(prompt, 12, "n", True, return_logprob=True, logprob_start_len=0)
            answer = server.post("/generate", body).json()
            found.append(
                json.dumps([answer["text"], answer["output_ids"], answer["meta_info"]["input_token_logprobs"]])
            )
            assert "kvshare" not in answer["meta_info"]
        assert not any(name.startswith("kvshare_") for name in server.metrics())
    return found


def test_output_is_identical_with_the_plugin_filtered_out():
    assert answers({}) == answers(WITHOUT_US)


def test_wrong_configuration_is_one_line_at_launch():
    (line,) = refused(launched([]), {"KVSHARE_STRATEGY": "cachblend"})
    assert all(word in line for word in ("cachblend", "cacheblend", "KVSHARE_STRATEGY"))


def test_a_slip_in_the_backends_name_is_one_line_at_launch():
    (line,) = refused(launched(["--radix-cache-backend", "kvshar"]))
    assert "'kvshar'" in line and "kvshare?" in line


def test_unsupported_settings_are_named_at_launch_and_before_it_by_doctor():
    arguments = ["--enable-hierarchical-cache", "--kv-cache-dtype", "fp8_e5m2"]
    tree, dtype = lines = refused(launched(arguments))
    assert "enable_hierarchical_cache=True" in tree and "Accepted: False" in tree
    assert "fp8_e5m2" in dtype and "bfloat16" in dtype
    assert refused([sys.executable, "-m", "kvshare_sched.tools.cli", "doctor", *arguments], start="REFUSED  ") == lines


def launched(arguments) -> list[str]:
    return launcher.command(launcher.fill_defaults(["--model-path", str(model.prepare()), *arguments]))


def refused(command, environment=None, start="kvshare: ") -> list[str]:
    """The lines beginning with `start` that a command prints before it ends by itself, with a failure."""
    ended = subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode != 0
    found = [line for line in (ended.stdout + ended.stderr).splitlines() if line.startswith(start)]
    assert found, (ended.stdout + ended.stderr)[-2000:]
    return [line.removeprefix(start) for line in found]
