"""Every place of SGLang 0.5.23 we hold on to, in one list; `kvshare doctor` and the contract tests check it.

A seam is a dotted path and the parameters (or members) that must be there. After an SGLang upgrade this list
fails first, with a readable line.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import pkgutil
import textwrap
from collections import defaultdict
from dataclasses import dataclass

from kvshare_sched.engine.sglang import support
from kvshare_sched.engine.sglang.hooks import HOOKS


@dataclass(frozen=True, slots=True)
class Seam:
    """One place we rely on: `names` are parameters of a callable, or fields and attributes of a class."""

    path: str
    names: tuple[str, ...] = ()
    kind: str = "parameters"  # or "members"

    def problem(self) -> str | None:
        """None when the installed SGLang has it, else what is wrong."""
        try:
            found = pkgutil.resolve_name(self.path)
            known = _members(found) if self.kind == "members" else _parameters(found) if self.names else ()
        except Exception as error:
            return f"{self.path}: not found ({type(error).__name__}: {error})"
        missing = [name for name in self.names if name not in known]
        return f"{self.path}: without {', '.join(missing)}" if missing else None


def _parameters(found) -> frozenset[str]:
    return frozenset(inspect.signature(found).parameters)


def _members(cls: type) -> frozenset[str]:
    """What an instance has: what the class says, its annotations, and what its methods assign to `self`."""
    names = set(dir(cls))
    for part in inspect.getmro(cls):
        names |= set(vars(part))  # `dir` leaves methods of enumerations out
        names |= set(getattr(part, "__annotations__", ()))
        if dataclasses.is_dataclass(part):
            names |= {f.name for f in dataclasses.fields(part)}
        if part.__module__.startswith("sglang."):
            names |= _assigned(part)
    return frozenset(names)


@functools.cache
def _assigned(cls: type) -> frozenset[str]:
    """Names of which the source of a class has `self.NAME = ...`; none where there is no source."""
    try:
        source = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return frozenset()
    stored = (n for n in ast.walk(source) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
    return frozenset(n.attr for n in stored if isinstance(n.value, ast.Name) and n.value.id == "self")


_SRT = "sglang.srt"
_TREE = f"{_SRT}.mem_cache.unified_cache.unified_tree_core_interface.UnifiedTreeCoreInterface"
_CACHE = f"{_SRT}.mem_cache.unified_radix_cache.UnifiedRadixCache"
_POLICY = f"{_SRT}.managers.schedule_policy"
_ADDER = f"{_POLICY}.PrefillAdder"
_SCHEDULER = f"{_SRT}.managers.scheduler.Scheduler"
_PARTS = f"{_SRT}.managers.scheduler_components"
_UPDATER = f"{_PARTS}.weight_updater.SchedulerWeightUpdaterManager"
_FROM_CLIENTS = (
    "TokenizedEmbeddingReqInput",
    "BatchTokenizedGenerateReqInput",
    "BatchTokenizedEmbeddingReqInput",
    "AbortReq",
    "OpenSessionReqInput",
    "CloseSessionReqInput",
)

# Class -> what we read or write of its instances.
MEMBERS = {
    # requests and their queue
    f"{_SRT}.managers.schedule_batch.Req": """
        beam_group cache_salt cached_tokens customized_info extend_end extend_len extra_key finished finished_output
        finished_reason full_untruncated_fill_ids input_embeds kv logprob logprob_start_len lora_id multimodal_inputs
        origin_input_ids output_ids output_ids_through_stop positional_embed_overrides prefix_len priority
        retracted_stain return_hidden_states return_logprob return_pooled_hidden_states rid sampling_params session
        skip_radix_cache_insert time_stats""",
    f"{_SRT}.managers.schedule_batch.ReqKvInfo": "cache_protected_len",
    f"{_SRT}.managers.schedule_batch.ReqLogprob": "input_token_ids_logprobs_val input_top_logprobs_idx",
    f"{_SRT}.managers.schedule_batch.ScheduleBatch": "reqs",
    f"{_SRT}.sampling.sampling_params.SamplingParams": "custom_params max_new_tokens",
    _ADDER: """
        can_run_list ceil_paged_tokens chunked_req_limit cur_rem_tokens memory_budget new_chunked_req page_size
        rem_chunk_tokens rem_input_tokens rem_total_tokens running_batch token_to_kv_pool_allocator tree_cache
        _get_running_request_total_token_offset""",
    f"{_SRT}.mem_cache.prefill_budget.PrefillBudget": "total_offset",
    f"{_SRT}.mem_cache.allocator.base.BaseTokenToKVPoolAllocator": "available_size size",
    f"{_POLICY}.SchedulePolicy": "enable_priority_scheduling priority_sign tree_cache",
    _SCHEDULER: """
        handle_generate_request is_fully_idle last_batch max_req_input_len page_size token_to_kv_pool_allocator
        tree_cache waiting_queue weight_updater _release_aborted_request""",
    _UPDATER: "offload_tags scheduler",
    f"{_PARTS}.output_streamer.SchedulerOutputStreamer": "tree_cache",
    # the cache
    _CACHE: "checkpoint full_evictable_size path_device_indices reset touch_prefix tree_core",
    _TREE: "dec_full_pin inc_full_pin match_full_device_prefix",
    f"{_SRT}.mem_cache.registry.TreeCacheBuildContext": "params server_args tp_rank tp_worker",
    f"{_SRT}.mem_cache.cache_init_params.CacheInitParams": "enable_metrics",
    f"{_SRT}.managers.tp_worker.TpModelWorker": "model_runner",
    # the model and its batches
    f"{_SRT}.model_executor.model_runner.ModelRunner": """
        attn_backend device dtype lora_manager model model_config prefill_attention_backend_str req_to_token_pool
        shared_read_done_event token_to_kv_pool""",
    f"{_SRT}.model_executor.forward_batch_info.ForwardBatch": """
        batch_size capture_hidden_mode extend_logprob_start_lens_cpu extend_num_tokens extend_prefix_lens
        extend_prefix_lens_cpu extend_seq_lens extend_seq_lens_cpu extend_start_loc forward_mode
        global_num_token_non_padded_cpu hidden_states input_ids lora_ids num_token_non_padded orig_seq_lens
        out_cache_loc positions req_pool_indices residual_stream return_logprob rids seq_lens seq_lens_cpu
        seq_lens_sum""",
    f"{_SRT}.model_executor.forward_batch_info.ForwardMode": "is_decode is_decode_or_idle is_extend",
    f"{_SRT}.model_executor.forward_batch_info.PPProxyTensors": "tensors",
    f"{_SRT}.configs.model_config.ModelConfig": """
        attention_arch context_len dtype hf_config hf_text_config is_encoder_decoder is_generation is_hybrid_swa
        is_multimodal""",
    f"{_SRT}.mem_cache.memory_pool.ReqToTokenPool": "req_to_token size",
    f"{_SRT}.mem_cache.memory_pool.MHATokenToKVPool": "dtype get_key_buffer get_value_buffer set_kv_buffer",
    f"{_SRT}.layers.attention.base_attn_backend.AttentionBackend": "forward init_forward_metadata",
    f"{_SRT}.layers.radix_attention.RadixAttention": """
        attn_type is_cross_attention layer_id logit_cap qk_head_dim scaling sliding_window_size tp_k_head_num
        tp_q_head_num tp_v_head_num use_irope v_head_dim""",
    f"{_SRT}.layers.linear.LinearBase": "quant_method",
    f"{_SRT}.layers.rotary_embedding.base.RotaryEmbedding": "cos_sin_cache is_neox_style _compute_cos_sin_cache",
    f"{_SRT}.layers.logits_processor.LogitsProcessorOutput": "next_token_logits",
    f"{_SRT}.lora.lora_manager.LoRAManager": "prepare_lora_batch",
    f"{_SRT}.models.llama.LlamaForCausalLM": "forward forward_split_prefill logits_processor model",
    f"{_SRT}.models.llama.LlamaModel": "layers",
    f"{_SRT}.models.llama.LlamaDecoderLayer": "attn_boundary self_attn",
    f"{_SRT}.models.llama.LlamaAttention": "attn rotary_emb",
    f"{_SRT}.distributed.parallel_state.GroupCoordinator": "all_reduce broadcast_object world_size",
    # the process that talks HTTP
    f"{_SRT}.managers.tokenizer_manager.TokenizerManager": "config_value context_len model_config server_status",
    f"{_SRT}.managers.io_struct.GenerateReqInput": """
        cache_salt extra_key input_ids priority rid sampling_params session_id session_params stream text""",
    f"{_SRT}.managers.io_struct.TokenizedGenerateReqInput": """
        cache_salt extra_key input_embeds input_ids logprob_start_len lora_id sampling_params session_id session_params
        stream token_ids_logprob top_logprobs_num""",
    f"{_SRT}.managers.io_struct.UnloadLoRAAdapterReqInput": "lora_id",
    # settings
    f"{_SRT}.server_args.ServerArgs": """
        attention_backend chat_template chunked_prefill_size cuda_graph_config device disable_priority_preemption
        dp_size enable_metrics enable_priority_scheduling enable_torch_compile host json_model_override_args
        kv_cache_dtype max_total_tokens mem_fraction_static model_path nnodes page_size quantization
        radix_cache_backend resolve_once revision schedule_low_priority_values_first schedule_policy tokenizer_path """
    + " ".join((*support.SETTINGS, *support.TENANT_SETTINGS)),
    f"{_SRT}.model_executor.cuda_graph_config.CudaGraphConfig": "decode prefill",
    f"{_SRT}.model_executor.cuda_graph_config.PhaseConfig": "backend",
    # an event in SGLang's trace of a request
    f"{_SRT}.observability.req_time_stats.ReqTimeStatsBase": "trace_ctx",
    f"{_SRT}.observability.trace.TraceNullContext": "tracing_enable",
    f"{_SRT}.observability.trace.TraceReqContext": "trace_event tracing_enable",
}


def _hooked() -> list[Seam]:
    """A seam for every place of the table of hooks."""
    takes: dict[str, dict[str, None]] = defaultdict(dict)
    for hook in HOOKS:
        takes[hook.place] |= dict.fromkeys(hook.takes)
    return [Seam(place, tuple(names)) for place, names in takes.items()]


SEAMS = (
    # be loaded
    Seam(f"{_SRT}.plugins.load_plugins"),
    Seam(f"{_SRT}.plugins.hook_registry.HookRegistry.register", ("target", "hook", "hook_type")),
    Seam(f"{_SRT}.plugins.hook_registry.HookType.AROUND"),
    Seam(f"{_SRT}.server_args.add_attention_backend_choices"),
    Seam(f"{_SRT}.arg_groups.model_override_base.resolved_view", ("server_args",)),
    Seam(f"{_SRT}.arg_groups.model_override_base.model_config_of", ("server_args",)),
    # the plain CPU
    Seam(f"{_SRT}.platforms.cpu.CpuDeviceMixin"),
    Seam(f"{_SRT}.platforms.interface.SRTPlatform.apply_server_args_defaults", ("self", "server_args")),
    Seam(f"{_SRT}.platforms.interface.SRTPlatform.get_default_attention_backend"),
    Seam(f"{_SRT}.layers.attention.attention_registry.register_attention_backend", ("name",)),
    Seam(
        f"{_SRT}.layers.attention.base_attn_backend.AttentionBackend.forward_extend",
        ("q", "k", "v", "layer", "forward_batch", "save_kv_cache"),
    ),
    Seam(
        f"{_SRT}.layers.attention.base_attn_backend.AttentionBackend.init_forward_metadata",
        ("forward_batch",),
    ),
    Seam(f"{_SRT}.platforms.interface.SRTPlatform.init_backend"),
    Seam(f"{_SRT}.lora.lora_manager.LoRAManager.init_state"),
    Seam(f"{_SRT}.mem_cache.memory_pool.KVWriteLoc"),
    Seam(f"{_SRT}.layers.quantization.unquant.UnquantizedLinearMethod.apply", ("layer", "x", "bias")),
    Seam(f"{_SRT}.layers.quantization.unquant.UnquantizedEmbeddingMethod.apply", ("layer", "x", "bias")),
    Seam(f"{_SRT}.layers.logits_processor.should_apply_lm_head_quant_method", ("lm_head", "quant_method")),
    # own the cache
    Seam(f"{_SRT}.mem_cache.registry.register_radix_cache_backend", ("name", "factory")),
    Seam(f"{_SRT}.mem_cache.registry.create_unified_radix_cache", ("ctx", "cache_class")),
    Seam(
        f"{_SRT}.mem_cache.registry.TreeCacheBuildContext",
        ("server_args", "params", "tp_worker", "tp_rank"),
    ),
    Seam(f"{_CACHE}.checkpoint", ("req", "up_to")),
    Seam(f"{_CACHE}.on_release", ("req", "checkpointed")),
    Seam(f"{_CACHE}.claim_kv_row", ("req",)),
    Seam(f"{_CACHE}.reset"),
    Seam(f"{_CACHE}.path_device_indices", ("node",)),
    Seam(f"{_CACHE}.touch_prefix", ("key",)),
    # not a client's request
    Seam(f"{_SRT}.managers.utils.is_health_check_generate_req", ("recv_req",)),
    # read and pin donors
    Seam(f"{_TREE}.match_full_device_prefix", ("key",)),
    Seam(f"{_TREE}.inc_full_pin", ("node_id",)),
    Seam(f"{_TREE}.dec_full_pin", ("node_id",)),
    Seam(f"{_SRT}.mem_cache.radix_cache.RadixKey", ("token_ids", "extra_key", "cache_salt")),
    # admission
    Seam(f"{_ADDER}.budget_state"),
    Seam(f"{_SRT}.managers.schedule_policy.CLIP_MAX_NEW_TOKENS"),
    Seam(f"{_ADDER}.ceil_paged_tokens", ("tokens",)),
    Seam(f"{_ADDER}.rem_total_tokens"),
    Seam(f"{_ADDER}.cur_rem_tokens"),
    Seam(f"{_ADDER}._get_running_request_total_token_offset", ("req",)),
    Seam(f"{_SRT}.mem_cache.prefill_budget.PrefillBudget.reserve", ("extend_input_len", "max_new_tokens")),
    Seam(f"{_POLICY}.AddReqResult.OTHER"),
    # run some rows through some layers
    Seam(f"{_SRT}.lora.lora_manager.LoRAManager.prepare_lora_batch", ("forward_batch",)),
    Seam(
        f"{_SRT}.models.llama.LlamaForCausalLM.forward_split_prefill",
        ("input_ids", "positions", "forward_batch", "split_interval"),
    ),
    Seam(f"{_SRT}.layers.layer_boundary.residual.batch.to_pp", ("hidden_states", "forward_batch")),
    Seam(f"{_SRT}.layers.layer_boundary.residual.batch.clear", ("forward_batch",)),
    Seam(f"{_SRT}.layers.layer_boundary.residual.batch.stream_of", ("forward_batch",)),
    Seam(f"{_SRT}.layers.layer_boundary.stage.StageBoundary.from_pp", ("tensors", "forward_batch")),
    Seam(
        f"{_SRT}.layers.logits_processor.LogitsProcessor.forward",
        ("input_ids", "hidden_states", "lm_head", "logits_metadata"),
    ),
    Seam(f"{_SRT}.layers.radix_attention.RadixAttention.forward", ("q", "k", "v", "forward_batch")),
    Seam(f"{_SRT}.mem_cache.memory_pool.MHATokenToKVPool.get_key_buffer", ("layer_id",)),
    Seam(f"{_SRT}.mem_cache.memory_pool.MHATokenToKVPool.set_kv_buffer", ("layer", "loc_info", "cache_k", "cache_v")),
    # attention of scattered rows on a GPU
    Seam(f"{_SRT}.model_executor.forward_context.forward_context", ("ctx",)),
    Seam(f"{_SRT}.model_executor.forward_context.ForwardContext", ("attn_backend",)),
    Seam(f"{_SRT}.model_executor.forward_context.get_attn_backend"),
    Seam(
        f"{_SRT}.layers.attention.base_attn_backend.AttentionBackend.forward",
        ("q", "k", "v", "layer", "forward_batch", "save_kv_cache"),
    ),
    Seam(f"{_SRT}.models.utils.create_fused_set_kv_buffer_arg"),
    Seam(f"{_SRT}.distributed.parallel_state.GroupCoordinator.all_reduce"),
    Seam(f"{_SRT}.distributed.parallel_state.GroupCoordinator.broadcast_object", ("obj", "src")),
    # audits: know when the engine is idle, send one request of our own, keep its output
    Seam(f"{_SCHEDULER}.is_fully_idle", ("self",)),
    # what operators ask: nothing of ours runs, and nothing of earlier weights is lent
    Seam(f"{_SCHEDULER}._release_aborted_request", ("req",)),
    *(Seam(f"{_SRT}.managers.io_struct.{name}") for name in _FROM_CLIENTS),
    Seam(f"{_SRT}.sampling.sampling_params.SamplingParams.normalize", ("tokenizer",)),
    Seam(f"{_SRT}.managers.schedule_batch.Req.output_ids_through_stop"),
    Seam(f"{_CACHE}.full_evictable_size"),
    # a decode that says a given answer, for measurements
    Seam(f"{_SRT}.sampling.custom_logit_processor.CustomLogitProcessor.__call__", ("logits", "custom_param_list")),
    # beam search: takes no part, and is refused with tenants
    Seam(f"{_SRT}.beam_search.coordinator.BeamCoordinator.validate_and_init", ("req", "recv_req")),
    Seam(f"{_SRT}.managers.io_struct.GenerateReqInput._sampling_params_beam_width"),
    # who is asking
    Seam(f"{_SRT}.managers.tokenizer_manager.TokenizerManager.config_value", ("name",)),
    Seam(f"{_SRT}.managers.tokenizer_manager.ServerStatus.Starting"),
    Seam(f"{_SRT}.entrypoints.http_server.app.add_middleware"),
    # an event in SGLang's trace of a request
    Seam(f"{_SRT}.observability.trace.TraceReqContext.trace_event", ("name", "level", "attrs")),
    Seam(f"{_SRT}.observability.trace_async.TraceReqContextAsync.trace_event", ("name", "level", "attrs")),
    # pages beside /metrics
    Seam(f"{_SRT}.runtime_context.get_serving"),
    Seam(f"{_SRT}.utils.auth.decide_request_auth", ("authorization_header", "api_key", "admin_api_key", "auth_level")),
    Seam(f"{_SRT}.utils.auth.AuthLevel.ADMIN_OPTIONAL"),
    Seam(f"{_SRT}.utils.auth.auth_level", ("level",)),
    # what we hook
    *_hooked(),
    # what we read and write
    *(Seam(path, tuple(names.split()), kind="members") for path, names in MEMBERS.items()),
)


def problems() -> list[str]:
    """One line for every seam the installed SGLang does not have. Raises ImportError when there is no SGLang."""
    import sglang  # noqa: F401

    return [problem for seam in SEAMS if (problem := seam.problem()) is not None]
