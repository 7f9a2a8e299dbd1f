"""A tiny Llama under SGLang's real LoRA manager, layers and batches, on a CPU; `test_lora_layers.py` runs it.

It lives in a process of its own, because SGLang publishes its settings once for a process. Prints one JSON object.
"""

import json
import sys
from array import array
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file

HIDDEN, HEADS, GROUPS, DIM, INNER, VOCABULARY, LAYERS = 64, 4, 2, 16, 96, 128, 2
SHAPES = {  # of the layers' weights: out, in
    "self_attn.q_proj": (HEADS * DIM, HIDDEN),
    "self_attn.k_proj": (GROUPS * DIM, HIDDEN),
    "self_attn.v_proj": (GROUPS * DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * DIM),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
PROMPTS = (11, 7, 9, 8)  # tokens
KEPT = ([0, 3, 4, 10], [1, 6], [2, 3, 8], [0, 5, 7])  # rows of each that run


def write_model(folder: Path) -> Path:
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32"}
    config |= {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": DIM}
    config |= {"intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    config |= {"max_position_embeddings": 64, "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    draw = torch.Generator().manual_seed(0)
    shapes = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in SHAPES.items()}
    shapes |= {"model.embed_tokens": (VOCABULARY, HIDDEN), "lm_head": (VOCABULARY, HIDDEN)}
    weights = {f"{name}.weight": torch.randn(shape, generator=draw) / shape[1] ** 0.5 for name, shape in shapes.items()}
    norms = [f"layers.{i}.{name}_layernorm" for i in range(LAYERS) for name in ("input", "post_attention")]
    weights |= {f"model.{name}.weight": torch.ones(HIDDEN) for name in (*norms, "norm")}
    save_file(weights, str(folder / "model.safetensors"))
    return folder


def write_adapter(folder: Path, rank: int, seed: int) -> Path:
    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    names = sorted({name.split(".")[1] for name in SHAPES} | {"embed_tokens"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": names, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    embedding = "base_model.model.model.embed_tokens.lora_embedding"
    weights = {f"{embedding}_A": torch.randn(rank, VOCABULARY, generator=draw) / rank**0.5}
    weights[f"{embedding}_B"] = torch.randn(HIDDEN, rank, generator=draw)
    for layer in range(LAYERS):
        for name, (out, into) in SHAPES.items():
            start = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{start}.lora_A.weight"] = torch.randn(rank, into, generator=draw) / into**0.5
            weights[f"{start}.lora_B.weight"] = torch.randn(out, rank, generator=draw) / rank**0.5
    save_file(weights, str(folder / "adapter_model.safetensors"))
    return folder


def load(folder: Path):
    """SGLang's own model runner, made as its `benchmark/one_batch.py` makes it, without a tokenizer."""
    from sglang.srt.arg_groups.lora_hook import check_lora_server_args
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import PortArgs, prepare_server_args

    load_plugins()
    a, b = write_adapter(folder / "a", 4, 1), write_adapter(folder / "b", 8, 2)
    arguments = ["--model-path", str(write_model(folder / "model")), "--skip-tokenizer-init"]
    arguments += ["--device", "cpu", "--dtype", "float32", "--attention-backend", "kvshare_cpu"]
    arguments += ["--max-total-tokens", "512", "--max-running-requests", "8", "--context-length", "64"]
    arguments += ["--enable-lora", "--lora-paths", f"a={a}", f"b={b}"]
    server_args = prepare_server_args(arguments)
    check_lora_server_args(server_args)
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    model_config = ModelConfig.from_server_args(server_args)
    port = PortArgs.init_new(server_args).nccl_port
    bootstrap.init_parallel_runtime(server_args=server_args, device="cpu", dist_port=port)
    bootstrap.init_layer_runtime(model_config=model_config)
    runner = ModelRunner(model_config, 0.1, 0, port, server_args)
    runner.alloc_memory_pool()
    runner.init_attention_backends()
    runner.init_cuda_graphs()
    return runner


class World:
    """One batch of four requests, two of one adapter, one of another and one of none, prefilled by SGLang."""

    def __init__(self, runner, *, adapters: bool):
        from sglang.benchmark.one_batch import TreeCacheNamespace
        from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
        from sglang.srt.sampling.sampling_params import SamplingParams
        from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

        self.runner = runner
        a, b = (ref.lora_id for ref in sorted(runner.lora_manager.lora_refs.values(), key=lambda ref: ref.lora_name))
        draw, reqs = np.random.default_rng(3), []
        for i, (length, adapter) in enumerate(zip(PROMPTS, (a, None, b, a), strict=True)):
            ids = array("q", draw.integers(0, VOCABULARY, length).tolist())
            sampling = SamplingParams(temperature=0, max_new_tokens=4)
            req = Req(str(i), "", ids, sampling, lora_id=adapter if adapters else None, vocab_size=VOCABULARY)
            req.full_untruncated_fill_ids = req.origin_input_ids
            req.logprob_start_len, req.extend_end = -1, length
            reqs.append(req)
        tree = TreeCacheNamespace(
            page_size=1, device="cpu", token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator
        )
        self.batch = ScheduleBatch.init_new(
            reqs=reqs,
            req_to_token_pool=runner.req_to_token_pool,
            token_to_kv_pool_allocator=runner.token_to_kv_pool_allocator,
            tree_cache=tree,
            model_config=runner.model_config,
            enable_overlap=False,
            spec_algorithm=SpeculativeAlgorithm.NONE,
        )
        self.batch.prepare_for_extend()
        if self.batch.input_ids is None:
            self.batch.input_ids = self.batch.prefill_input_ids_cpu

    def forward(self, forward=None) -> torch.Tensor:
        """Logits of SGLang's forward pass over the batch; forward: instead of the model's own."""
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch

        made = ForwardBatch.init_new(self.batch, self.runner, return_hidden_states_before_norm=False)
        own = self.runner.model.forward
        if forward is not None:
            self.runner.model.forward = forward
        try:
            with torch.no_grad():
                return self.runner.forward(made).logits_output.next_token_logits.clone()
        finally:
            self.runner.model.forward = own

    def decode(self) -> None:
        """The batch goes on to its first decode step."""
        self.batch.prepare_for_decode()
        self.batch.input_ids = torch.arange(len(PROMPTS))


def kept_rows(per_request) -> np.ndarray:
    keep = np.zeros(sum(PROMPTS), bool)
    for start, rows in zip(np.cumsum((0, *PROMPTS)), per_request, strict=False):
        keep[start + np.array(rows)] = True
    return keep


def measure(runner) -> dict[str, float]:
    """Largest differences of logits to SGLang's own forward pass."""
    from kvshare_sched.engine.sglang import lora
    from kvshare_sched.engine.sglang.batches import Batch, SGLangEngine
    from kvshare_sched.engine.sglang.rotary import rotary_table
    from kvshare_sched.runtime.executor import Executor
    from kvshare_sched.settings import KVShareConfig

    pipeline = SimpleNamespace(config=KVShareConfig(), weights=0, abandon=lambda session: None)
    pipeline.chunk_done = lambda session, end: None
    engine = SGLangEngine(runner)
    executor = Executor(pipeline, engine, *rotary_table(runner.model))
    some, fewer = kept_rows(KEPT), kept_rows([rows[-2:] for rows in KEPT])

    def selected(input_ids, positions, batch, **_):  # all layers over the rows kept, then fewer
        whole = Batch(input_ids, positions, batch)
        view = engine.select(whole, np.flatnonzero(some))
        engine.run(view, 0, 1)
        view = engine.narrow(whole, view, np.flatnonzero(fewer), 1)
        return engine.finish(whole, view, 1)

    def asking(input_ids, positions, batch, **_):  # rows of two requests alone, then all of SGLang's
        view = engine.select(Batch(input_ids, positions, batch), np.flatnonzero(some)[4:9])
        engine.run(view, 0, 1)
        raise RuntimeError("meant to be")

    plain, world = World(runner, adapters=False).forward(), World(runner, adapters=True)
    own = world.forward()

    def off(logits) -> float:
        return (logits - own).abs().max().item()

    found = {"base": off(plain), "selected": off(world.forward(selected))}
    executor._chunks = lambda batch: [mock.MagicMock(start=0, end=0, reused=np.ones(1, bool))]
    executor._run = lambda batch, chunks: asking(batch.input_ids, batch.positions, batch.forward)

    def failing(input_ids, positions, batch, **_):
        return executor.forward(Batch(input_ids, positions, batch))

    found["failed"] = off(world.forward(failing))
    # Without us the tests above must fail.
    with mock.patch.object(lora, "restore", lambda *_: None):
        found["unrestored"] = off(world.forward(failing))
    with mock.patch.object(lora, "route", lambda *_: None):
        found["unrouted"] = off(world.forward(selected))

    world.forward()  # the prompts' own KV again
    world.decode()
    own = world.forward()
    chosen = {0: np.array([2, 5]), 2: np.array([1])}

    def repaired(input_ids, positions, batch, **_):
        tokens = np.concatenate([np.array(world.batch.reqs[r].origin_input_ids)[p] for r, p in chosen.items()])
        whole = Batch(input_ids, positions, batch)
        return engine.decode(whole, engine.extend(whole, chosen, tokens))

    return found | {"repaired": off(world.forward(repaired))}


if __name__ == "__main__":
    print(json.dumps(measure(load(Path(sys.argv[1])))))
