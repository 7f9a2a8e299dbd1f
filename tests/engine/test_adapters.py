"""Adapters (LoRA): reuse under each of them, and nothing from one to another."""

from __future__ import annotations

import contextlib

import models
import numpy as np
import pytest
from bench import running
from models import VOCABULARY, Reference

CLOSE = 1e-3  # nats: float32 against float64
PARTS = [np.random.default_rng(n).integers(0, VOCABULARY - 2, 200).tolist() for n in range(4)]


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY - 2, length).tolist()


def moved(order=(2, 0, 3, 1)) -> list[int]:
    return text(11, 30) + sum((PARTS[i] for i in order), []) + text(12, 9)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict:
    """Two adapters."""
    found = tmp_path_factory.mktemp("adapters")
    return {name: models.write_adapter(found / name, seed) for seed, name in enumerate(("one", "two"), 1)}


@contextlib.contextmanager
def adapted(model, folders, **options):
    """(engine, ask): an engine with both adapters. ask(adapter or None, prompt, ...) runs until it is answered."""
    words = ["--enable-lora", "--max-lora-rank", "4", "--max-loras-per-batch", "3"]
    words += ["--lora-paths", *(f"{name}={path}" for name, path in folders.items())]
    settings = {"audit_share": 0} | options.pop("settings", {})
    with running(model, arguments=words, settings=settings, **options) as engine:

        def send(adapter, prompt, tokens=4, **fields):
            ids = {ref.lora_name: ref.lora_id for ref in engine.runner.lora_manager.lora_refs.values()}
            return engine.send(prompt, tokens=tokens, lora_id=adapter and ids[adapter], **fields)

        def ask(*args, **fields):
            ticket = send(*args, **fields)
            engine.run()
            return ticket

        ask.send = send
        yield engine, ask


def know(ask, *adapters, key: str) -> dict:
    """Compute the texts under these adapters; returns the fields of who may borrow them."""
    for adapter in adapters:
        ask(adapter, text(10, 20) + sum(PARTS, []), tokens=1, extra_key=key)
    return {"extra_key": key}


def off_by(reference: Reference, ticket) -> float:
    """Largest difference of an output token's log-probability from the reference's, nats."""
    log_p = reference(ticket.prompt + ticket.output).log_p[len(ticket.prompt) - 1 : -1]
    return float(np.abs(log_p[np.arange(len(ticket.output)), ticket.output] - ticket.output_logprobs).max())


def test_every_cell_recomputed_is_plain_prefill_of_the_adapter(deep, folders):
    reference, base, scored = Reference(deep, folders["one"]), Reference(deep), {"return_logprob": True, "tokens": 12}
    with adapted(deep, folders) as (_, ask):
        full = ask("one", moved(), custom={"kvshare": "off"}, extra_key="cold", **scored)
        ours = ask("one", moved(), custom={"kvshare": {"ratio": 1.0}}, **know(ask, "one", key="warm"), **scored)
    assert ours.report["outcome"] == "reused" and ours.report["recomputed"] == ours.report["reused"] > 600
    assert ours.output == full.output
    assert off_by(reference, ours) < CLOSE and off_by(reference, full) < CLOSE
    assert off_by(base, ours) > 0.1, "the control: the adapter matters"


@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_moved_text_is_reused_under_an_adapter(flat, folders, loop):
    """On a model whose KV does not depend on context the answer is the exact one."""
    reference = Reference(flat, folders["one"])
    with adapted(flat, folders, loop=loop) as (_, ask):
        warm = ask("one", moved(), tokens=12, return_logprob=True, **know(ask, "one", key="warm"))
    report = warm.report
    assert report["outcome"] == "reused" and report["reused"] > 0.9 * len(warm.prompt)
    assert 0 < report["recomputed"] < report["reused"]
    assert off_by(reference, warm) < CLOSE
    assert warm.output[0] == int(reference(warm.prompt).logits[-1].argmax())


@pytest.mark.parametrize(("seen", "asks"), [("two", "one"), (None, "one"), ("one", None)])
def test_text_of_another_adapter_is_not_borrowed(deep, folders, seen, asks):
    with adapted(deep, folders) as (_, ask):
        key = know(ask, seen, key="k")
        stranger = ask(asks, moved(), tokens=1, **key).report
        assert (stranger["outcome"], stranger["reason"], stranger["exact"]) == ("ordinary", "no_match", 0)
        assert ask(seen, moved(), tokens=1, **key).report["reused"] > 600, "the control"


@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_adapters_and_the_base_model_reuse_in_one_batch(deep, folders, loop):
    """What a request answers does not depend on the adapters beside it."""
    adapters = ("one", None, "two", "one")
    prompts = [moved(order) for order in ((2, 0, 3, 1), (3, 2, 1, 0), (1, 0, 3, 2), (3, 1, 0, 2))]
    with adapted(deep, folders, loop=loop, chunk=2048, pool=8000) as (engine, ask):
        pairs = [*zip(adapters, prompts, strict=True)]
        alone = [ask(a, p, **know(ask, a, key=f"alone {n}")) for n, (a, p) in enumerate(pairs)]
        key = know(ask, "one", None, "two", key="together")
        together = [ask.send(a, p, **key) for a, p in pairs]
        engine.run()
    for one, other in zip(alone, together, strict=True):
        assert one.report["outcome"] == other.report["outcome"] == "reused"
        assert other.report["reused"] == one.report["reused"] > 600
        assert other.output == one.output


def test_an_audit_runs_under_the_adapter_of_its_request(deep, folders, monkeypatch):
    """Recomputed in full the request differs from its reference by rounding; the base model's would be far off."""
    with adapted(deep, folders, settings={"audit_share": 1.0}) as (engine, ask):
        found, auditor = [], engine.pipeline.auditor
        monkeypatch.setattr(auditor, "_learn", lambda capture, measured: found.append((capture.tenant, measured.kl)))
        warm = ask("one", moved(), custom={"kvshare": {"ratio": 1.0}}, **know(ask, "one", key="k"))
        assert warm.report["outcome"] == "reused" and auditor.tokens >= len(warm.prompt)
    ((tenant, kl),) = found
    assert tenant == "k" and kl < 1e-4


@pytest.mark.parametrize("share", [0, 1.0])
def test_an_adapter_under_the_name_of_another_borrows_nothing_of_it(deep, folders, share):
    """As SGLang's HTTP process does: a new id for each that is loaded, whatever its name."""
    from sglang.srt.managers.io_struct import LoadLoRAAdapterReqInput, UnloadLoRAAdapterReqInput

    with adapted(deep, folders, settings={"audit_share": share}) as (engine, ask):

        def operator(request) -> None:
            engine.control(request)
            engine.step(3)
            assert engine.answers[-1].success, engine.answers[-1]

        def load(path: str, number: str) -> None:
            operator(LoadLoRAAdapterReqInput(lora_name="three", lora_path=str(folders[path]), lora_id=number))

        load("two", "first")
        key = know(ask, "three", key="k")
        borrowed = ask.send("three", moved(), tokens=1, **key)
        while borrowed.finished is None:
            engine.step()
        assert borrowed.report["reused"] > 600
        # Its audit may be waiting, or running.
        operator(UnloadLoRAAdapterReqInput(lora_name="three", lora_id="first"))
        load("one", "second")
        report = ask("three", moved(), tokens=1, **key).report
        assert (report["outcome"], report["reason"], report["exact"]) == ("ordinary", "no_match", 0)
