"""What is refused at start-up, by name and with the remedy; and the model's rotary table.

`refusals` reads settings and configuration only, so `kvshare doctor` and the launcher can ask before any
weight is loaded; `refuse` looks at the loaded engine as well.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import sys
from typing import Any

import torch

from kvshare_sched.errors import ConfigError, UnsupportedError
from kvshare_sched.settings import KVShareConfig
from kvshare_sched.tenants import reload, seal

SGLANG_VERSION = "0.5.23"

# Server setting -> (value that is fine, why anything else is refused). All untested with reuse.
SETTINGS = {
    "speculative_algorithm": (None, "speculative decoding writes KV the planner does not know"),
    "enable_dp_attention": (False, "data-parallel attention pads batches across ranks"),
    "pp_size": (1, "pipeline stages hold only some of the layers"),
    "dcp_size": (1, "decode context parallelism splits the KV of a request"),
    "attn_cp_size": (1, "context parallelism splits the rows of a request"),
    "enable_hierarchical_cache": (False, "donors on the host are not leased"),
    "enable_lmcache": (False, "another cache owns the tree"),
    "enable_flexkv": (False, "another cache owns the tree"),
    "enable_unified_cache_external_linker": (False, "donors in another store are not leased"),
    "enable_kv_cache_sharding": (False, "a rank holds only some pages of the KV"),
    "kv_canary": ("none", "it was not read what it expects of copied slots"),
    "enable_lora_overlap_loading": (False, "adapters arrive in a stream of their own"),
    "lora_backend": (("csgmv", "triton", "torch_native"), "it was not read how it finds the adapter of a row"),
    "disable_radix_cache": (False, "without the tree there are no donors"),
    "disaggregation_mode": ("null", "prefill and decode run on different servers"),
    "enable_page_major_kv_layout": (False, "KV is not laid out slot by slot"),
    "enable_two_batch_overlap": (False, "batches are split in two inside the model"),
    "enable_layernorm_sp": (False, "rows are split over the ranks between layers"),
    "enable_attn_tp_input_scattered": (False, "rows are split over the ranks between layers"),
    "model_impl": (("auto", "sglang"), "SGLang's own model classes are known, others are not"),
    "enable_return_hidden_states": (False, "hidden states of reused rows do not exist"),
    "enable_return_aux_hidden_states": (False, "hidden states of reused rows do not exist"),
    # SGLang takes the rows of a layer for those of the whole batch: every request of it would get wrong ones.
    "enable_return_routed_experts": (False, "experts of reused rows are not known"),
    "enable_return_indexer_topk": (False, "choices of reused rows are not known"),
    "enable_pdmux": (False, "prefill and decode share the device in two streams"),
    "dllm_algorithm": (None, "diffusion models compute rows more than once"),
}
# The same with a tenants file: what would let requests in unidentified, or hand out others' answers.
TENANT_SETTINGS = {
    "tokenizer_worker_num": (1, "further HTTP processes load no plug-ins, so nobody would be identified there"),
    "api_key": (None, "the tenants file holds the keys"),
    "grpc_port": (None, "gRPC carries no identity"),
    "smg_grpc_mode": (False, "gRPC carries no identity"),
    "enable_response_store": (False, "stored answers are handed to whoever names them"),
    "enable_custom_logit_processor": (False, "the body would carry code that runs in the engine, beside all tenants"),
    "enable_session_radix_cache": (False, "a session can be continued by whoever names it"),
}
# SGLang's model classes; tests/engine/test_families.py compares reuse in each with full computation. A class that is
# not here may leave keys unturned, attend in chunks, or compute something else when it is split by layers.
MODELS = (
    "ApertusForCausalLM",
    "Glm4ForCausalLM",
    "IQuestCoderForCausalLM",
    "InternLM3ForCausalLM",
    "LlamaForCausalLM",
    "Ministral3ForCausalLM",
    "MistralForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)
# Fields of a text model's configuration -> what a class does that heeds them.
_MODEL_FIELDS = {
    "attention_chunk_size": "attends in chunks",
    "dual_chunk_attention_config": "turns keys by their place in a chunk",
    "sliding_window_pattern": "slides a window over some layers and leaves the others without rotary embedding",
}
_GPU_BACKENDS = ("flashinfer", "fa3", "triton")  # of ordinary rows
_KV_DTYPES = ("auto", "bfloat16", "bf16", "float16", "float32")


def version_refusal() -> str | None:
    """A line when the installed SGLang is not the one the seams were read in."""
    try:
        found = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found == SGLANG_VERSION:
        return None
    return (
        f"sglang {found} is installed; kvshare accepts {SGLANG_VERSION}, whose internals it hooks into. "
        f"Install sglang=={SGLANG_VERSION}, or drop --radix-cache-backend kvshare."
    )


def check_server_args(original, server_args):
    """Around `ServerArgs.check_server_args`, in the launcher: stop before anything is spawned, one line each."""
    from sglang.srt.arg_groups.model_override_base import resolved_view
    from sglang.srt.mem_cache.registry import registered_radix_cache_backends

    from kvshare_sched.settings import BACKEND

    original(server_args)
    chosen = resolved_view(server_args).radix_cache_backend
    if chosen != BACKEND:
        if _tenants_file():
            raise SystemExit(
                f"kvshare: KVSHARE_TENANTS_FILE is set, but --radix-cache-backend is {chosen!r}: nobody would be "
                f"identified. Choose {BACKEND}, or unset KVSHARE_TENANTS_FILE."
            )
        # SGLang finds out only when the model is loaded; a slip of the pen should not take that long.
        if chosen not in registered_radix_cache_backends() and difflib.get_close_matches(str(chosen), [BACKEND]):
            raise SystemExit(
                f"kvshare: --radix-cache-backend {chosen!r} is not registered; accepted: "
                f"{', '.join(registered_radix_cache_backends())}. Did you mean {BACKEND}?"
            )
        return
    try:
        path = KVShareConfig.load().tenants_file
        if path:
            reload.read(path)
            nodes = resolved_view(server_args).nnodes
            if nodes > 1 and not os.environ.get(seal.SECRET):
                raise ConfigError(f"nnodes={nodes} with a tenants file: set {seal.SECRET} to one secret on all nodes.")
        found = refusals(server_args)
    except ConfigError as problem:
        found = [str(problem)]
    if found:
        raise SystemExit("\n".join(f"kvshare: {line}" for line in found))
    if path:
        seal.prepare()


def _tenants_file() -> str:
    try:
        return KVShareConfig.load().tenants_file
    except ConfigError:  # of no concern to a server without our backend
        return ""


def server_args_of(arguments: list[str]) -> Any:
    """SGLang's ServerArgs of a command line. Raises what SGLang raises for arguments it refuses."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    server_args = prepare_server_args(arguments)
    server_args.resolve_once()
    return server_args


def refusals(server_args) -> list[str]:
    """One line for every setting or model feature that cannot be served, from configuration alone."""
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolved_view
    from sglang.srt.environ import envs
    from sglang.srt.model_executor.cuda_graph_config import Backend

    found = [line] if (line := version_refusal()) else []
    model = model_config_of(server_args)
    server_args = resolved_view(server_args)
    config = KVShareConfig.load()
    for name, (fine, why) in (SETTINGS | (TENANT_SETTINGS if config.tenants_file else {})).items():
        value = getattr(server_args, name, None)
        accepted = fine if isinstance(fine, tuple) else (fine,)
        if value is not None and value not in accepted:
            shown = "(set)" if name.endswith("key") else repr(value)  # this line goes into logs
            found.append(f"{name}={shown} is not supported: {why}. Accepted: {accepted[0]!r}.")
    if config.tenants_file and envs.SGLANG_RUST_SERVER.get():
        found.append(
            "SGLANG_RUST_SERVER is not supported with a tenants file: its HTTP server runs no Python. Unset it."
        )
    if config.library and not config.tenants_file:
        found.append("KVSHARE_LIBRARY lends to the groups of a tenants file. Set KVSHARE_TENANTS_FILE as well.")
    if config.library and server_args.dp_size != 1:
        found.append(f"dp_size={server_args.dp_size} is not supported with KVSHARE_LIBRARY: one engine would hold it.")
    if server_args.kv_cache_dtype not in _KV_DTYPES:
        found.append(
            f"kv_cache_dtype={server_args.kv_cache_dtype!r} is not supported: rotating quantised keys is untested. "
            f"Accepted: {', '.join(_KV_DTYPES)}."
        )
    if server_args.cuda_graph_config.prefill.backend != Backend.DISABLED:
        found.append(
            "prefill CUDA graphs are not supported: a captured graph runs all rows of all layers. "
            "Add --disable-prefill-cuda-graph."
        )
    # On a CPU SGLang captures nothing unless it compiles the model, whatever the setting says.
    captured = server_args.device != "cpu" or server_args.enable_torch_compile
    graphs = captured and server_args.cuda_graph_config.decode.backend != Backend.DISABLED
    if graphs and (rows := config.repair_rows):
        found.append(
            f"repair_rows={rows} is not supported with decode CUDA graphs: a captured graph takes no repair rows. "
            "Add --disable-cuda-graph, or leave KVSHARE_REPAIR_ROWS at 0."
        )
    return found + _model_refusals(model)


def _model_refusals(model) -> list[str]:
    from sglang.srt.configs.model_config import AttentionArch

    names = model.hf_config.architectures or ["without a name"]
    found = [] if names[0] in MODELS else [_class_refusal(names[0])]
    name = ", ".join(names)
    if not model.is_generation:
        found.append(f"model {name} is not a generation model: there is no KV to reuse.")
    if model.attention_arch != AttentionArch.MHA:
        found.append(f"model {name} uses {model.attention_arch.name} attention; accepted: plain MHA/GQA.")
    text = model.hf_text_config
    windowed = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    if model.is_hybrid_swa or windowed:
        found.append(f"model {name} uses sliding-window attention; accepted: full attention in every layer.")
    for setting, why in _MODEL_FIELDS.items():
        if value := getattr(text, setting, None):
            found.append(f"model {name} {why} ({setting}={value!r}); accepted: full attention in every layer.")
    if others := set(getattr(text, "layer_types", None) or ()) - {"full_attention"}:
        found.append(
            f"model {name} has layers of {', '.join(sorted(others))}; accepted: full_attention in all of them."
        )
    if model.is_multimodal:
        found.append(f"model {name} is multimodal; accepted: text models.")
    if model.is_encoder_decoder:
        found.append(f"model {name} is an encoder-decoder; accepted: decoders.")
    return found + _check_layer_refusals(KVShareConfig.load(), getattr(text, "num_hidden_layers", None))


def _class_refusal(name: str) -> str:
    return (
        f"model class {name} is not supported: reuse was not compared with full computation in it. Accepted: "
        f"{', '.join(MODELS)}. Serve one of these, or drop --radix-cache-backend kvshare."
    )


def _check_layer_refusals(config: KVShareConfig, layers: int | None) -> list[str]:
    """layers: None where a class has another name for them, which is refused anyway.

    The default stands in any model: where it is too high, `strategies.base.first_check` lowers it.
    """
    highest = max((layers or 0) - 2, KVShareConfig().check_layer)
    if layers is None or config.check_layer <= highest:
        return []
    return [
        f"check_layer={config.check_layer} leaves no layer above it to compute fewer rows in: the model has {layers} "
        f"layers. Accepted: 1 <= check_layer <= {highest}. Set KVSHARE_CHECK_LAYER or the key in KVSHARE_CONFIG."
    ]


def refuse(server_args, model_runner) -> None:
    """Raise UnsupportedError unless this loaded engine can be served."""
    found = refusals(server_args)
    model = model_runner.model
    name, module = type(model).__name__, type(model).__module__
    if name not in MODELS:
        found.append(_class_refusal(name))
    elif not module.startswith("sglang.srt.models."):
        found.append(
            f"model class {name} comes from {module}; accepted: SGLang's own. Unset SGLANG_EXTERNAL_MODEL_PACKAGE."
        )
    found += _attention_refusals(model)
    pool = model_runner.token_to_kv_pool
    if type(pool).__name__ != "MHATokenToKVPool":
        found.append(f"KV pool {type(pool).__name__} is not supported; accepted: MHATokenToKVPool.")
    if model_runner.device == "cuda":
        found += _gpu_refusals(model, pool, model_runner.prefill_attention_backend_str)
    if found:
        raise UnsupportedError("kvshare cannot serve this configuration:\n  - " + "\n  - ".join(dict.fromkeys(found)))


def _attention_refusals(model) -> list[str]:
    """A line for every kind of attention that is not causal attention over all that stands before a row."""
    from sglang.srt.layers.radix_attention import AttentionType

    kinds = {
        "attend in chunks (use_irope)": lambda layer: layer.use_irope,
        "slide a window": lambda layer: layer.sliding_window_size > 0,
        "are not causal self-attention": lambda layer: (
            layer.is_cross_attention or layer.attn_type != AttentionType.DECODER
        ),
    }
    layers = _attention_layers(model)
    found = ((kind, [name for name, layer in layers.items() if is_so(layer)]) for kind, is_so in kinds.items())
    return [
        f"layers {kind}: {_some(names)}; accepted: full attention in all of them." for kind, names in found if names
    ]


def _attention_layers(model) -> dict[str, torch.nn.Module]:
    from sglang.srt.layers.radix_attention import RadixAttention

    return {name: module for name, module in model.named_modules() if isinstance(module, RadixAttention)}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _gpu_refusals(model, pool, backend: str | None) -> list[str]:
    """What is refused on a GPU alone; what cannot be known before kernels are chosen, `gpu.attention` refuses."""
    found = []
    if backend not in _GPU_BACKENDS:
        found.append(f"prefill attention backend {backend!r} is not supported; accepted: {', '.join(_GPU_BACKENDS)}.")
    fuses = hasattr(sys.modules[type(model).__module__], "create_fused_set_kv_buffer_arg")
    if fuses and pool.dtype == torch.bfloat16:
        found.append(
            f"model class {type(model).__name__} writes bfloat16 K and V before its attention layer is asked, so the "
            "donors' copies would be gone when they are compared. Use --dtype float16."
        )
    return found
