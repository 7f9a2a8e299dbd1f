"""`make gpu-check` without a GPU: its stages run through on a tiny shape, and a run that is cut keeps what it has."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_check  # noqa: E402
from gpu import prefill, report  # noqa: E402
from gpu.results import Results  # noqa: E402
from gpu.shapes import SHAPES  # noqa: E402

from kvshare_sched.errors import SetupError  # noqa: E402


@pytest.mark.triton
@pytest.mark.parametrize("share", [1.0, 0.1])
def test_measured_road_computes_what_it_says(share, device):
    """With every row computed anew, reuse is full prefill; with few of them only those rows' KV is written anew."""
    from kvshare_kernels.triton_attention import TritonAttention

    shape, tokens = SHAPES["tiny"], 40
    torch.manual_seed(0)
    model = prefill.Decoder(shape, tokens, device, torch.float32)
    kernel = TritonAttention(shape.heads, shape.groups, shape.dim, dtype=torch.float32)
    fresh = np.array([0, 1, 37, 38, 39])
    with torch.inference_mode():
        full = model.off()
        wanted = [k[tokens:].clone() for k in model.keys]
        logits, cells = model.on(kernel, fresh, share)
    anew = 40 if share == 1 else 5 + 3
    assert cells == anew * shape.layers + len(fresh) * (shape.layers // 3)
    if share == 1:
        assert torch.allclose(logits, full, rtol=1e-3, atol=1e-3)
        assert all(torch.allclose(k[tokens:], w, atol=1e-3) for k, w in zip(model.keys, wanted, strict=True))
    else:
        same = (model.keys[-1][tokens:] - wanted[-1]).abs().amax(dim=(1, 2)) < 1e-3
        assert 0 < int(same.sum()) < 40


@pytest.mark.cpu
def test_every_stage_that_can_run_here_leaves_its_file(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), "--device", "cpu", "--shapes", "tiny"]
    command += ["--tokens", "64", "--ratios", "0.2", "--stages", "ops,kernels,prefill", "--out", str(tmp_path)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "ops: left out" in done.stdout
    for stage, wanted in (("kernels", {"kernel", "seconds", "share_of_limit"}), ("prefill", set(report.TIMES))):
        found = json.loads((tmp_path / f"{stage}.json").read_text())
        assert found["complete"] and {"device", "versions", "settings", "results"} <= set(found)
        assert all(wanted <= set(result) for result in found["results"]) and found["results"]
    assert "plain torch" in (tmp_path / "report.md").read_text() and (tmp_path / "ttft.png").exists()


@pytest.mark.parametrize("trouble", [None, "no server", "no reuse"])
def test_the_engine_stage_tells_by_its_exit_code_and_goes_on(trouble, tmp_path, monkeypatch):
    pytest.importorskip("requests")  # the operators' tests also run with torch and Triton alone
    from gpu import engine

    started = []

    @contextlib.contextmanager
    def running(arguments, **kwargs):
        started.append(json.loads(Path(arguments[1], "config.json").read_text())["num_hidden_layers"])
        if trouble == "no server" and len(started) == 1:
            raise SetupError("the server did not come up")
        yield "http://nowhere"

    def generate(client, prompt, *, new_tokens, namespace, reuse=True):
        outcome = "reused" if reuse and not (trouble == "no reuse" and len(started) == 1) else "ordinary"
        report = {"outcome": outcome, "reused": 1900, "fresh": 100, "recomputed": 190, "layers": 3}
        report["computed_cells"] = 870
        return SimpleNamespace(ttft_s=0.2 if outcome == "reused" else 1.0, report=report)

    monkeypatch.setattr(engine.launch, "running", running)
    monkeypatch.setattr(engine.Client, "generate", generate)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    shapes = ["llama-3.1-8b", "tiny"]
    options = SimpleNamespace(shapes=shapes, tokens=[2048], ratios=[0.1], out=tmp_path / "out", device="cuda")
    with pytest.raises(SystemExit) if trouble else contextlib.nullcontext():
        gpu_check.stage("engine", options)
    found = json.loads((tmp_path / "out" / "engine.json").read_text())
    measured = [r for r in found["results"] if "ttft_ratio" in r]
    assert started == [32, 3] and found["complete"] is (trouble is None)
    assert [r["model_shape"] for r in measured] == (shapes if trouble is None else ["tiny"])
    assert all(set(report.TIMES) <= set(r) for r in measured)
    assert (measured[-1]["ttft_ratio"], measured[-1]["share_of_limit"]) == (5.0, 0.725)
    if trouble == "no server":
        assert "did not come up" in found["results"][0]["failed"]


@pytest.mark.parametrize("tokens", [2048, 8192, 32768, 65536])
def test_prompts_of_the_engine_stage_are_documents_in_another_order(tokens):
    pytest.importorskip("requests")
    from gpu.engine import Prompts

    donor, prompt = Prompts(10**9).moved(tokens)
    assert len(prompt) == tokens
    where = {token: i for i, token in enumerate(donor)}
    shifts = [where[t] - i for i, t in enumerate(prompt) if t in where]
    assert len(shifts) > 0.85 * tokens and len(set(shifts)) >= 6 and 0 not in shifts


def test_nothing_run_is_no_success(tmp_path, monkeypatch):
    command = ["gpu_check.py", "--stages", "ops", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert gpu_check.main() == 1 and not list(tmp_path.iterdir())


def test_the_demo_is_a_result_like_the_others(tmp_path):
    demo = json.loads((ROOT / "benchmarks" / "demo.json").read_text())
    found = gpu_check.of_demo(demo)
    assert set(report.TIMES) <= set(found) and found["kl_mean"] == demo["kl_mean"]
    assert (found["ttft_ratio"], found["ratio"]) == (demo["ttft_ratio_median"], 0.18)
    results = Results(tmp_path, "quality", {})
    results.add(**found)
    report.write(tmp_path)
    told = (tmp_path / "report.md").read_text()
    assert f"| {demo['model']} | sglang |" in told and f"| {demo['model']} | {demo['kl_mean']:.4g} |" in told
    assert (tmp_path / "ttft.png").exists()


def test_a_run_that_is_cut_keeps_what_it_has(tmp_path):
    results = Results(tmp_path, "kernels", {"shapes": ["tiny"]})
    results.add(model_shape="tiny", kernel="top_k", seconds=0.123456789)
    results.note(copy_gb_s=1.0)
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert not found["complete"] and found["results"] == [
        {"model_shape": "tiny", "kernel": "top_k", "seconds": 0.12346}
    ]
    assert found["settings"] == {"shapes": ["tiny"], "copy_gb_s": 1.0}
    report.write(tmp_path)
    assert "cut short" in (tmp_path / "report.md").read_text()


def test_outcomes_are_counted_as_they_come(tmp_path):
    tests = tmp_path / "test_it.py"
    tests.write_text("def test_good(): pass\ndef test_bad(): assert 'FAILED' == 0, 'because'\n")
    (tmp_path / "conftest.py").write_text("def pytest_addoption(parser): parser.addoption('--device')\n")
    results = Results(tmp_path, "e2e", {})
    with pytest.raises(SystemExit):
        gpu_check.tested(results, [str(tests)], "cpu")
    found = json.loads((tmp_path / "e2e.json").read_text())
    assert found["settings"] == {"passed": 1, "failed": 1} and not found["complete"]
    failed, whole = found["results"]
    assert "test_bad" in failed["failed"] and (whole["exit_code"], whole["passed"], whole["failed"]) == (1, 1, 1)


@pytest.fixture
def in_the_background():
    """What a shell starts there is told to ignore interrupts."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_stage_out_of_time_leaves_nobody_behind(in_the_background, tmp_path):
    """Its processes may clean up first: a server lives in a session of its own, and is stopped by its parent."""
    child = f"trap 'touch {tmp_path}/tidied; exit' INT; touch {tmp_path}/there; sleep 600"
    stubborn = f"trap '' INT; echo $$ > {tmp_path}/pid; for i in $(seq 600); do sleep 1; done"
    environment = dict(os.environ)
    assert gpu_check.within(1, ["bash", "-c", f'bash -c "{child}"; true'], environment) == 124
    assert (tmp_path / "there").exists() and (tmp_path / "tidied").exists()
    assert gpu_check.within(1, ["bash", "-c", stubborn], environment, patience_s=1) == 124
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
    assert gpu_check.within(60, ["bash", "-c", "exit 3"], environment) == 3


def test_dummy_models_are_of_the_published_size():
    """Billions of parameters, embeddings and head included, as the models' names say."""
    for name, billions in (("llama-3.1-8b", 8.03), ("qwen2.5-7b", 7.61), ("yi-1.5-9b", 8.83)):
        shape = SHAPES[name]
        assert abs((shape.layers * shape.weights + 2 * shape.vocabulary * shape.hidden) / 1e9 - billions) < 0.02
        assert shape.config()["num_key_value_heads"] == shape.groups
