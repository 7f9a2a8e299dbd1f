#!/usr/bin/env bash
# sglang 0.5.23: without CUDA graphs a model is given another ForwardBatch, without what an extension has put on it.
#
# Expected: the eager runner is the plain way: it has no graph to replay, so the model's forward should get the batch
#   that the worker built, or a view that carries, as the registry's docstring says, whatever is not one of its buffers.
# Happens: the runner copies the inputs into buffers of its own and makes a new ForwardBatch by dataclasses.replace,
#   in every prefill and decode. Declared fields are carried; attributes set on the instance are gone, and tensors that the caller
#   kept from the old batch are no longer those that the model reads.
# Matters: the usual way to hand a plan to one's own attention backend or layer, an attribute set in a hook on the
#   worker, silently arrives nowhere. A context variable, or a hook behind the runner, does arrive.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
source "$here/lib/sglang-cpu.sh"
sglang_cpu "$dir/venv"

cat > "$dir/run.py" <<'PY'
import dataclasses
from importlib.metadata import version

import torch
from sglang.srt.model_executor.cuda_graph_buffer_registry import build_eager_registry
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.runner.eager_runner import EagerRunner
from sglang.srt.runtime_context import publish
from sglang.srt.server_args import ServerArgs

print("sglang", version("sglang"))
publish(ServerArgs(model_path="dummy", device="cpu"), role="test")
runner = object.__new__(EagerRunner)  # its constructor wants a loaded model; load_batch only its buffers
runner._eager_registry = build_eager_registry(
    device=torch.device("cpu"), max_bs=4, max_num_token=16, cache_loc_dtype=torch.int64,
    encoder_lens_dtype=torch.int64)
batch = ForwardBatch(
    forward_mode=ForwardMode.EXTEND, batch_size=1, input_ids=torch.tensor([7, 8, 9]),
    req_pool_indices=torch.tensor([0]), seq_lens=torch.tensor([3]), out_cache_loc=torch.tensor([4, 5, 6]),
    seq_lens_sum=3)
batch.my_plan = "rows to recompute"
loaded = runner.load_batch(batch)
fields = {field.name for field in dataclasses.fields(ForwardBatch)}
lost = set(vars(batch)) - set(vars(loaded))
print("the same object:", loaded is batch, "- the same input tensor:", loaded.input_ids is batch.input_ids)
print("input ids:", loaded.input_ids.tolist(), "- attributes lost:", sorted(lost))
assert loaded.input_ids.tolist() == [7, 8, 9] and not lost & fields, "changed: what is carried"
assert loaded is not batch and lost == {"my_plan"}, "changed: attributes of the instance are carried"
batch.input_ids[0] = 1
print("input ids after a write to the old batch:", loaded.input_ids.tolist())
assert loaded.input_ids.tolist() == [7, 8, 9], "changed: the buffers are the caller's"
PY
"$dir/venv/bin/python" "$dir/run.py"
