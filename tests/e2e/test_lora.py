"""Adapters (LoRA): reuse under each of them, and nothing from one to another."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import pytest
import torch
from harness import ROUNDING, SYSTEMS, chat, sections, settled
from safetensors import safe_open
from safetensors.torch import save_file

from kvshare_sched.client import model
from kvshare_sched.client.http import Client, kl_divergence

pytestmark = pytest.mark.gpu  # on a CPU: engine/test_adapters.py, on tiny models and in seconds
RANK, SHARE = 8, 0.05  # of an adapter; size of what it adds to a weight
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FOLDER = Path(tempfile.gettempdir()) / "kvshare-e2e-lora"
ARGUMENTS = ["--enable-lora", "--lora-paths", f"one={FOLDER / 'one'}", f"two={FOLDER / 'two'}"]
ENVIRONMENT = {"KVSHARE_AUDIT_SHARE": "0.5"}
DOCS = sections()
DONE = 'kvshare_audits_total{reason="none",result="done"}'


def write_adapter(name: str, seed: int) -> None:
    """A random adapter of the embedded model, in PEFT's format."""
    folder, draw, weights = FOLDER / name, torch.Generator().manual_seed(seed), {}
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none", "target_modules": list(PROJECTIONS)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with safe_open(model.prepare() / "model.safetensors", "pt") as base:
        for key in base.keys():  # noqa: SIM118 (no dictionary)
            if key.split(".")[-2] not in PROJECTIONS:
                continue
            weight, start = base.get_tensor(key), f"base_model.model.{key.removesuffix('.weight')}"
            out, into = weight.shape
            size = SHARE * weight.float().std().item() / RANK**0.5
            weights[f"{start}.lora_A.weight"] = torch.randn(RANK, into, generator=draw)
            weights[f"{start}.lora_B.weight"] = torch.randn(out, RANK, generator=draw) * size
    save_file(weights, str(folder / "adapter_model.safetensors"))


@pytest.fixture(scope="module")
def server(slot, request):
    write_adapter("one", 1)
    write_adapter("two", 2)
    return slot.take(request.module)


class Adapted(Client):
    """The server for those who name an adapter; None is the base model."""

    def __init__(self, server, adapter: str | None):
        super().__init__(server.url)
        self.adapter = adapter

    def _body(self, *args, **kwargs) -> dict:
        return super()._body(*args, **kwargs) | ({"lora_path": self.adapter} if self.adapter else {})


def with_donor(server, *clients: Client) -> str:
    """A namespace whose tree holds one prompt over DOCS[0:4] under these adapters, and no answer."""
    namespace = server.namespace()
    for client in clients:
        client.generate(chat(SYSTEMS[0], DOCS[:4]), new_tokens=1, namespace=namespace)
    return namespace


def moved(server, order=(2, 0, 3, 1)) -> list[int]:
    return server.tokenize(chat(SYSTEMS[1], [DOCS[i] for i in order], "Which section is about names?"))


@pytest.fixture
def one(server):
    return Adapted(server, "one")


def test_every_cell_recomputed_is_plain_prefill_of_the_adapter(server, one):
    prompt, cold, everything = moved(server), server.namespace(), {"ratio": 1.0}
    full = one.generate(prompt, new_tokens=12, namespace=cold, reuse=False)
    ids = one.likely_ids(prompt, full.token_ids, cold)
    theirs, _ = one.log_probabilities(prompt, full.token_ids, ids, cold, reuse=False)
    ours, told = one.log_probabilities(prompt, full.token_ids, ids, with_donor(server, one), reuse=everything)
    assert told["outcome"] == "reused" and told["recomputed"] == told["reused"] > 600
    worst = max(abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))
    assert worst < ROUNDING
    base, _ = server.log_probabilities(prompt, full.token_ids, ids, server.namespace(), reuse=False)
    assert max(abs(a - b) for x, y in zip(base, theirs, strict=True) for a, b in zip(x, y, strict=True)) > 0.1


def test_moved_documents_are_reused_under_an_adapter(server, one):
    prompt, cold = moved(server), server.namespace()
    full = one.generate(prompt, new_tokens=12, namespace=cold, reuse=False)
    warm = one.generate(prompt, new_tokens=12, namespace=with_donor(server, one))
    report = settled(warm)
    assert report["outcome"] == "reused" and report["reused"] > 0.9 * warm.prompt_tokens
    assert 0 < report["recomputed"] < report["reused"]
    assert warm.token_ids[0] == full.token_ids[0]
    ids = one.likely_ids(prompt, full.token_ids, cold)
    theirs, _ = one.log_probabilities(prompt, full.token_ids, ids, cold, reuse=False)
    ours, told = one.log_probabilities(prompt, full.token_ids, ids, with_donor(server, one), reuse=True)
    assert told["outcome"] == "reused"
    assert 0 < kl_divergence(theirs, ours) < 0.3


@pytest.mark.parametrize(("seen", "asks"), [("two", "one"), (None, "one"), ("one", None)])
def test_text_of_another_adapter_is_not_borrowed(server, seen, asks):
    namespace = with_donor(server, Adapted(server, seen))
    stranger = settled(Adapted(server, asks).generate(moved(server), new_tokens=1, namespace=namespace))
    assert (stranger["outcome"], stranger["reason"], stranger["exact"]) == ("ordinary", "no_match", 0)
    assert settled(Adapted(server, seen).generate(moved(server), new_tokens=1, namespace=namespace))["reused"] > 600


def test_adapters_and_the_base_model_reuse_in_one_batch(server, one):
    """What a request answers does not depend on the adapters beside it."""
    clients = [one, server, Adapted(server, "two"), one]
    prompts = [moved(server, order) for order in ((2, 0, 3, 1), (3, 2, 1, 0), (1, 0, 3, 2), (3, 1, 0, 2))]
    # A namespace for each alone: an audit leaves exact KV behind.
    pairs = zip(clients, prompts, strict=True)
    answers = [c.generate(p, new_tokens=1, namespace=with_donor(server, c)) for c, p in pairs]
    body = server._body(prompts, 1, with_donor(server, *clients[:3]), True)
    found = server.post("/generate", body | {"lora_path": ["one", None, "two", "one"]}).json()
    for answer, other in zip(answers, found, strict=True):
        report = other["meta_info"]["kvshare"]
        assert settled(answer)["outcome"] == report["outcome"] == "reused"
        assert report["reused"] == answer.report["reused"] > 600
        assert tuple(other["output_ids"]) == answer.token_ids


def test_an_audit_runs_under_the_adapter_of_its_request(server, one):
    """Recomputed in full the request differs from its reference by rounding; the base model's would be far off."""
    before = server.metrics()[DONE]
    namespace = with_donor(server, one)
    warm = one.generate(moved(server), new_tokens=4, namespace=namespace, reuse={"ratio": 1.0})
    assert settled(warm)["outcome"] == "reused"
    series = f'kvshare_tenant_audit_kl_nats_sum{{span="sent",tenant="{namespace}"}}'
    deadline = time.monotonic() + 60
    while series not in (found := server.metrics()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert found[DONE] > before and found[series] < ROUNDING / 10


def test_an_adapter_under_the_name_of_another_borrows_nothing_of_it(server):
    def load(path: str) -> None:
        server.post("/load_lora_adapter", {"lora_name": "three", "lora_path": str(FOLDER / path)})

    three = Adapted(server, "three")
    load("two")
    namespace = with_donor(server, three)
    assert settled(three.generate(moved(server), new_tokens=1, namespace=namespace))["reused"] > 600
    server.post("/unload_lora_adapter", {"lora_name": "three"})  # its audit may be waiting, or running
    load("one")
    report = settled(three.generate(moved(server), new_tokens=1, namespace=namespace))
    assert (report["outcome"], report["reason"], report["exact"]) == ("ordinary", "no_match", 0)
