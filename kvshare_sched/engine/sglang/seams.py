"""Every place of SGLang 0.5.23 we hold on to, in one list; `kvshare doctor` and the contract tests check it.

A seam is a dotted path and the parameters (or members) that must be there. After an SGLang upgrade this list
fails first, with a readable line.
"""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
from dataclasses import dataclass


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
        except Exception as error:
            return f"{self.path}: not found ({type(error).__name__}: {error})"
        missing = [name for name in self.names if name not in _names_of(found, self.kind)]
        return f"{self.path}: without {', '.join(missing)}" if missing else None


def _names_of(found, kind: str) -> set[str]:
    if kind == "parameters":
        return set(inspect.signature(found).parameters)
    names = set(dir(found))
    for cls in inspect.getmro(found) if inspect.isclass(found) else ():
        names |= set(getattr(cls, "__annotations__", ()))
        if dataclasses.is_dataclass(cls):
            names |= {f.name for f in dataclasses.fields(cls)}
    return names


_SRT = "sglang.srt"
_TREE = f"{_SRT}.mem_cache.unified_cache.unified_tree_core_interface.UnifiedTreeCoreInterface"
_CACHE = f"{_SRT}.mem_cache.unified_radix_cache.UnifiedRadixCache"
_POLICY = f"{_SRT}.managers.schedule_policy"
_ADDER = f"{_POLICY}.PrefillAdder"
_SCHEDULER = f"{_SRT}.managers.scheduler.Scheduler"
_OPENAI = f"{_SRT}.entrypoints.openai"

_UPDATER = f"{_SRT}.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_WEIGHT_UPDATES = (
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_tensor",
    "update_weights_from_ipc",
    "begin_weight_update",
    "end_weight_update",
)
_FROM_CLIENTS = (
    "TokenizedEmbeddingReqInput",
    "BatchTokenizedGenerateReqInput",
    "BatchTokenizedEmbeddingReqInput",
    "AbortReq",
    "OpenSessionReqInput",
    "CloseSessionReqInput",
)

SEAMS = (
    # be loaded
    Seam(f"{_SRT}.plugins.load_plugins"),
    Seam(f"{_SRT}.plugins.hook_registry.HookRegistry.register", ("target", "hook", "hook_type")),
    Seam(f"{_SRT}.plugins.hook_registry.HookType.AROUND"),
    Seam(f"{_SRT}.server_args.add_attention_backend_choices"),
    Seam(f"{_SRT}.server_args.ServerArgs.check_server_args", ("self",)),
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
    Seam(f"{_ADDER}.add_one_req", ("req", "has_chunked_req", "truncation_align_size")),
    Seam(f"{_ADDER}.add_chunked_req", ("req",)),
    Seam(f"{_ADDER}.preempt_to_schedule", ("req",)),
    Seam(f"{_ADDER}.budget_state"),
    Seam(f"{_SRT}.managers.schedule_policy.CLIP_MAX_NEW_TOKENS"),
    Seam(f"{_ADDER}.ceil_paged_tokens", ("tokens",)),
    Seam(f"{_ADDER}.rem_total_tokens"),
    Seam(f"{_ADDER}.cur_rem_tokens"),
    Seam(f"{_ADDER}._get_running_request_total_token_offset", ("req",)),
    Seam(f"{_SRT}.mem_cache.prefill_budget.PrefillBudget.reserve", ("extend_input_len", "max_new_tokens")),
    Seam(f"{_POLICY}.AddReqResult.OTHER"),
    # the waiting queue
    Seam(f"{_POLICY}.SchedulePolicy.calc_priority", ("waiting_queue", "running_batch", "processed_tokens")),
    Seam(
        f"{_POLICY}.SchedulePolicy.shortest_prefill_chunk_limit",
        ("chunked_req", "waiting_queue", "budget", "page_size"),
    ),
    Seam(f"{_SRT}.managers.schedule_batch.Req.finished"),
    # run some rows through some layers
    Seam(
        f"{_SRT}.model_executor.forward_batch_info.ForwardBatch",
        (
            "rids",
            "seq_lens_cpu",
            "extend_prefix_lens_cpu",
            "extend_seq_lens_cpu",
            "out_cache_loc",
            "req_pool_indices",
            "residual_stream",
            "hidden_states",
            "global_num_token_non_padded_cpu",
            "num_token_non_padded",
            "return_logprob",
            "extend_logprob_start_lens_cpu",
            "capture_hidden_mode",
            "lora_ids",
        ),
        kind="members",
    ),
    Seam(f"{_SRT}.model_executor.forward_batch_info.ForwardBatch.init_new", ("batch",)),
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
    Seam(f"{_SCHEDULER}.on_idle", ("self",)),
    Seam(f"{_SCHEDULER}.is_fully_idle", ("self",)),
    Seam(f"{_SCHEDULER}.handle_generate_request", ("recv_req",)),
    # what operators ask: nothing of ours runs, and nothing of earlier weights is lent
    Seam(f"{_SCHEDULER}.process_input_requests", ("self", "recv_reqs")),
    Seam(f"{_SCHEDULER}._release_aborted_request", ("req",)),
    Seam(f"{_UPDATER}", ("scheduler", "offload_tags"), kind="members"),
    *(Seam(f"{_UPDATER}.{name}", ("self", "recv_req")) for name in _WEIGHT_UPDATES),
    *(Seam(f"{_SRT}.managers.io_struct.{name}") for name in _FROM_CLIENTS),
    Seam(f"{_SCHEDULER}.unload_lora_adapter", ("self", "recv_req")),
    Seam(f"{_SRT}.managers.io_struct.UnloadLoRAAdapterReqInput", ("lora_id",), kind="members"),
    Seam(
        f"{_SRT}.managers.scheduler_components.output_streamer.SchedulerOutputStreamer.stream_output",
        ("reqs", "return_logprob", "skip_req"),
    ),
    Seam(
        f"{_SRT}.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"
        ".is_request_level_customized_info_key",
        ("self", "key"),
    ),
    Seam(
        f"{_SRT}.managers.io_struct.TokenizedGenerateReqInput",
        (
            "input_ids",
            "logprob_start_len",
            "top_logprobs_num",
            "token_ids_logprob",
            "extra_key",
            "cache_salt",
            "lora_id",
        ),
        kind="members",
    ),
    Seam(f"{_SRT}.sampling.sampling_params.SamplingParams.normalize", ("tokenizer",)),
    Seam(f"{_SRT}.managers.schedule_batch.Req.output_ids_through_stop"),
    Seam(
        f"{_SRT}.managers.schedule_batch.ReqLogprob",
        ("input_token_ids_logprobs_val", "input_top_logprobs_idx"),
        kind="members",
    ),
    Seam(f"{_SRT}.layers.logits_processor.LogitsProcessorOutput", ("next_token_logits",), kind="members"),
    Seam(f"{_CACHE}.full_evictable_size"),
    # a decode that says a given answer, for measurements
    Seam(f"{_SRT}.sampling.custom_logit_processor.CustomLogitProcessor.__call__", ("logits", "custom_param_list")),
    # beam search: takes no part, and is refused with tenants
    Seam(f"{_SRT}.beam_search.coordinator.BeamCoordinator.validate_and_init", ("req", "recv_req")),
    Seam(f"{_SRT}.managers.io_struct.GenerateReqInput._sampling_params_beam_width"),
    # who is asking
    Seam(f"{_SRT}.managers.tokenizer_manager.TokenizerManager.generate_request", ("self", "obj", "request")),
    Seam(f"{_SRT}.managers.tokenizer_manager.TokenizerManager._stream_one_response", ("obj", "state", "request")),
    Seam(f"{_SRT}.managers.io_struct.TokenizedGenerateReqInput", ("stream", "sampling_params"), kind="members"),
    Seam(f"{_SRT}.managers.tokenizer_manager.TokenizerManager._send_one_request", ("tokenized_obj",)),
    Seam(f"{_SRT}.managers.tokenizer_manager.TokenizerManager._send_batch_request", ("tokenized_objs",)),
    Seam(f"{_SRT}.managers.tokenizer_manager.TokenizerManager.config_value", ("name",)),
    Seam(f"{_SRT}.managers.tokenizer_manager.ServerStatus.Starting"),
    Seam(f"{_SCHEDULER}.handle_generate_request", ("recv_req", "mm_input_error")),
    Seam(
        f"{_SRT}.managers.io_struct.GenerateReqInput",
        (
            "session_id",
            "rid",
            "extra_key",
            "cache_salt",
            "priority",
            "sampling_params",
            "session_params",
            "text",
            "input_ids",
        ),
        kind="members",
    ),
    Seam(
        f"{_SRT}.entrypoints.http_server._setup_and_run_http_server",
        ("server_args", "tokenizer_manager", "template_manager", "port_args", "scheduler_infos"),
    ),
    Seam(f"{_SRT}.entrypoints.http_server.app.add_middleware"),
    # an event in SGLang's trace of a request
    Seam(f"{_SRT}.observability.req_time_stats.ReqTimeStatsBase", ("trace_ctx",), kind="members"),
    Seam(f"{_SRT}.observability.trace.TraceReqContext.trace_event", ("name", "level", "attrs")),
    Seam(f"{_SRT}.observability.trace.TraceNullContext", ("tracing_enable",), kind="members"),
    Seam(f"{_SRT}.observability.trace_async.TraceReqContextAsync.trace_event", ("name", "level", "attrs")),
    # pages beside /metrics
    Seam(f"{_SRT}.utils.common.add_prometheus_middleware", ("app",)),
    Seam(f"{_SRT}.runtime_context.get_serving"),
    Seam(f"{_SRT}.utils.auth.decide_request_auth", ("authorization_header", "api_key", "admin_api_key", "auth_level")),
    Seam(f"{_SRT}.utils.auth.AuthLevel.ADMIN_OPTIONAL"),
    Seam(f"{_SRT}.utils.auth.auth_level", ("level",)),
    # tell the client
    Seam(
        f"{_SRT}.managers.tokenizer_manager.TokenizerManager.update_request_meta_info",
        ("meta_info", "state", "customized_info", "index", "finish_reason"),
    ),
    Seam(f"{_OPENAI}.serving_chat.OpenAIServingChat._build_chat_response", ("request", "ret", "created")),
    Seam(f"{_OPENAI}.serving_chat.OpenAIServingChat._generate_chat_stream"),
    Seam(
        f"{_OPENAI}.serving_completions.OpenAIServingCompletion._build_completion_response",
        ("request", "ret", "created"),
    ),
    Seam(f"{_OPENAI}.serving_completions.OpenAIServingCompletion._generate_completion_stream"),
)


def problems() -> list[str]:
    """One line for every seam the installed SGLang does not have."""
    return [problem for seam in SEAMS if (problem := seam.problem()) is not None]
