"""Adapters: SGLang's real LoRA layers over our batches, its namespaces, and audits whose adapter goes."""

from __future__ import annotations

import json
import subprocess
import sys
from array import array
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.model_executor.cuda_graph_config import Backend
from sglang.srt.sampling.sampling_params import SamplingParams

from kvshare_sched.engine.sglang import audit_hooks, support
from kvshare_sched.engine.sglang.requests import namespace_of
from kvshare_sched.engine.sglang.tree import radix_key
from kvshare_sched.tenants.namespaces import TENANT, name_of, owner_of
from radix_ext.records import Donor


@pytest.fixture(scope="module")
def off(tmp_path_factory) -> dict[str, float]:
    """Largest differences of logits to SGLang's own forward pass, see `lora_world.measure`."""
    program = [sys.executable, str(Path(__file__).with_name("lora_world.py")), str(tmp_path_factory.mktemp("lora"))]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_rows_of_a_mixed_batch_run_under_their_own_adapters(off):
    assert off["base"] > 1, "the adapters must matter"
    assert off["selected"] < 1e-4 and off["repaired"] < 1e-4  # float32, sums of up to 128 terms in another order
    assert off["unrouted"] > 1


def test_after_a_failure_the_ordinary_forward_finds_its_adapters(off):
    assert off["failed"] == 0
    assert off["unrestored"] > 1


def request(adapter: str | None, extra_key: str | None) -> Req:
    return Req("r", "", array("q", range(8)), SamplingParams(), lora_id=adapter, extra_key=extra_key, cache_salt="s")


@pytest.mark.parametrize("extra_key", [None, name_of("mark", TENANT, "acme")])
@pytest.mark.parametrize("adapter", [None, LoRARef.deterministic_id("one", "/one")])
def test_a_namespace_names_its_owner_and_leads_to_the_tree(adapter, extra_key):
    req = request(adapter, extra_key)
    namespace = namespace_of(req)
    assert (namespace.extra_key, namespace.lora_id) == (extra_key, adapter)
    assert owner_of(namespace.extra_key) == ("acme" if extra_key else "")
    key = radix_key(Donor(0, namespace, np.arange(8)))
    assert (key.extra_key, key.cache_salt) == (req.extra_key, "s")


def test_an_audit_asks_as_its_request_did():
    req = request("adapter", "blue")
    audit = SimpleNamespace(
        rid="a", namespace=namespace_of(req), tokens=[1, 2], ids=[3], capture=SimpleNamespace(prompt_len=1)
    )
    asked = audit_hooks.request_of(audit, upto=2)
    again = request(asked.lora_id, asked.extra_key)
    assert (again.extra_key, again.lora_id, asked.cache_salt) == (req.extra_key, "adapter", "s")


def test_two_adapters_never_have_one_id():
    """Loaded under one name from one path, one after the other: the KV of the first must not be found again."""
    assert LoRARef(lora_name="one", lora_path="/one").lora_id != LoRARef(lora_name="one", lora_path="/one").lora_id


def test_audits_go_before_the_adapter_that_they_need():
    asked, audits = [], [SimpleNamespace(namespace=SimpleNamespace(lora_id=name)) for name in ("gone", "stays")]
    auditor = SimpleNamespace(forget=lambda why, concerned: asked.append((why, [concerned(one) for one in audits])))
    scheduler = SimpleNamespace(tree_cache=SimpleNamespace(pipeline=SimpleNamespace(auditor=auditor)))
    told = SimpleNamespace(lora_id="gone")
    audit_hooks.unload_lora_adapter(lambda *_: asked.append("unloaded"), scheduler, told)
    assert asked == [("unloaded", [True, False]), "unloaded"]


def test_what_was_not_read_of_lora_is_refused_by_name(monkeypatch):
    from sglang.srt.arg_groups import model_override_base

    settings = SimpleNamespace(
        **{"enable_lora": True, "lora_backend": "csgmv", "enable_lora_overlap_loading": False, "dp_size": 1},
        **{"kv_cache_dtype": "auto", "device": "cpu", "enable_torch_compile": False},
        cuda_graph_config=SimpleNamespace(prefill=SimpleNamespace(backend=Backend.DISABLED)),
    )
    monkeypatch.setattr(model_override_base, "resolved_view", lambda args: args)
    monkeypatch.setattr(model_override_base, "model_config_of", lambda args: None)
    monkeypatch.setattr(support, "_model_refusals", lambda model: [])
    assert support.refusals(settings) == []
    settings.lora_backend, settings.enable_lora_overlap_loading = "triton_v2", True
    overlap, backend = support.refusals(settings)
    assert "enable_lora_overlap_loading=True" in overlap
    assert "lora_backend='triton_v2'" in backend
