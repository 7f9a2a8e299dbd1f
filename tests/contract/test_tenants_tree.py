"""Guarantees against SGLang's own tree: pins survive eviction, splits and flushes, and give everything back."""

from __future__ import annotations

import json
from array import array
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import publish
from sglang.srt.server_args import ServerArgs

from kvshare_sched.engine.sglang.tree import DonorTree
from kvshare_sched.tenants.policy import Stamp
from kvshare_sched.tenants.scheduler_state import Desk
from radix_ext.index import SegmentIndex
from radix_ext.records import Namespace

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 8, "hidden_size": 8}
CONFIG |= {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


class World:
    """SGLang's tree over slots that are only counted."""

    def __init__(self):
        self.slot = 1
        allocator = SimpleNamespace(device="cpu", page_size=1, dtype=torch.float32, available_size=lambda: 0)
        allocator.free = lambda slots: None
        allocator.free_segment = lambda slots, start_pos: None
        pool = SimpleNamespace(device="cpu")
        self.cache = UnifiedRadixCache(
            CacheInitParams(False, pool, allocator, page_size=1, tree_components=(ComponentType.FULL,))
        )
        self.tree, self.desk = DonorTree(self.cache), Desk()
        self.index = SegmentIndex(window=16, min_run=32, capacity=100_000, limits=self.desk.limits)

    def publish(self, owner: str, tokens: np.ndarray) -> None:
        slots = torch.arange(self.slot, self.slot + len(tokens))
        self.slot += len(tokens)
        self.cache.insert(InsertParams(key=RadixKey(array("q", tokens.tolist()), owner), value=slots))
        self.index.add(Namespace(owner), tokens)
        self.desk.published(owner, self.index, self.tree)

    def live(self, owner: str) -> list[int]:
        return [self.tree.live_len(donor) for donor in self.index.donors.values() if donor.owner == owner]

    def evict_everything(self) -> None:
        self.cache.evict(EvictParams(num_tokens=1 << 20))


@pytest.fixture(scope="module", autouse=True)
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    args = ServerArgs(model_path=str(folder), device="cpu")
    args.resolve_once()
    publish(args, role="scheduler")


@pytest.fixture
def world():
    return World()


def text(seed: int, length: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).permutation(1000)[:length] + 1000 * seed


def test_a_guarantee_outlives_eviction_and_the_rest_does_not(world):
    world.desk.learn(Stamp("acme", guaranteed=300), world.tree)
    world.publish("acme", text(1))
    world.publish("globex", text(2))
    world.evict_everything()
    assert world.live("acme") == [200] and world.live("globex") == [0]
    assert world.cache.protected_size() == world.desk.held_tokens == 200 and world.cache.evictable_size() == 0


def test_a_pin_holds_when_its_node_is_split_and_is_given_back_whole(world):
    world.desk.learn(Stamp("acme", guaranteed=300), world.tree)
    world.publish("acme", text(1))
    # Another path of the same tenant leaves in the middle of the first, and is too long to be guaranteed.
    world.publish("acme", np.concatenate((text(1)[:100], text(3, 900))))
    world.evict_everything()
    assert world.live("acme") == [200, 100]
    world.desk.let_go(world.tree)
    assert world.cache.protected_size() == 0
    world.evict_everything()
    assert world.live("acme") == [0, 0] and world.cache.evictable_size() == 0


def test_a_growing_donor_is_pinned_anew_and_nothing_leaks(world):
    world.desk.learn(Stamp("acme", guaranteed=1000), world.tree)
    for length in (50, 120, 200):
        world.publish("acme", text(1)[:length])
    assert world.cache.protected_size() == 200
    world.desk.learn(Stamp("acme", guaranteed=0), world.tree)
    world.desk.published("acme", world.index, world.tree)
    assert world.cache.protected_size() == 0 and world.cache.evictable_size() == 200


def test_a_flush_takes_the_pins_along(world):
    world.desk.learn(Stamp("acme", guaranteed=300), world.tree)
    world.publish("acme", text(1))
    world.cache.reset()
    world.index.clear()
    world.desk.flushed()
    assert world.cache.protected_size() == 0
    world.publish("acme", text(1))
    assert world.cache.protected_size() == 200
