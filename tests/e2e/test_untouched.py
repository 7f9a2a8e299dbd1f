"""Plugin installed, backend not chosen: byte for byte the SGLang it was, same platform, same attention backend."""

from __future__ import annotations

import json

import pytest
from harness import SYSTEMS, chat, sections, start

from kvshare_sched import server as launcher

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


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"KVSHARE_STRATEGY": "cachblend"}, ("cachblend", "cacheblend", "KVSHARE_STRATEGY")),
        ({"KVSHARE_RATIO": "1.5"}, ("1.5", "0.0 <= ratio <= 1.0")),
        ({"KVSHARE_WINDOWS": "3"}, ("KVSHARE_WINDOWS", "window")),
    ],
)
def test_wrong_configuration_is_one_line_at_launch(environment, named, tmp_path):
    out = _launch([], environment)
    lines = [line for line in out.splitlines() if line.startswith("kvshare: ")]
    assert len(lines) == 1 and all(word in lines[0] for word in named), out[-2000:]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--enable-hierarchical-cache"], ("enable_hierarchical_cache=True", "Accepted: False")),
        (["--kv-cache-dtype", "fp8_e5m2"], ("fp8_e5m2", "bfloat16")),
        (["--radix-cache-backend", "kvshar"], ("'kvshar'", "kvshare")),
    ],
)
def test_unsupported_server_settings_are_named_at_launch(arguments, named):
    out = _launch(arguments, {})
    lines = [line for line in out.splitlines() if line.startswith("kvshare: ")]
    assert len(lines) == 1 and all(word in lines[0] for word in named), out[-2000:]


def _launch(arguments, environment) -> str:
    """What a launch that must be refused prints; it must end by itself and with a failure."""
    import os
    import subprocess

    from kvshare_sched import model

    line = launcher.command(launcher.fill_defaults(["--model-path", str(model.prepare()), *arguments]))
    ended = subprocess.run(
        line, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode != 0
    return ended.stdout + ended.stderr
