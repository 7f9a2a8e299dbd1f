#!/usr/bin/env bash
# sglang 0.5.23: a request-level value is read after the first token of a stream, and at the end of any other answer.
#
# Expected: `Req.customized_info` carries an extension's values to the client. A key that the extension's streamer names
#   as request-level "is emitted once rather than token-sliced", so what the request holds when it ends should arrive,
#   streamed or not.
# Happens: of a streamed request the scheduler sends the value that is there with the first chunk, and never again; of
#   any other request it sends the one that is there at the end. The same request reports different values, and in a
#   stream whatever was learnt after the first token (counts, timings, a verdict on the answer) does not leave the scheduler.
# Matters: a report for each request, tested without streaming, is stale or empty for streaming clients; what changes
#   while the answer grows must ride on the tokens, under a key that is not request-level.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
source "$here/lib/sglang-cpu.sh"
sglang_cpu "$dir/venv"

cat > "$dir/run.py" <<'PY'
import types
from array import array
from importlib.metadata import version

from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.io_struct import unwrap_from_pickle
from sglang.srt.managers.schedule_batch import FINISH_LENGTH, Req
from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

print("sglang", version("sglang"))
publish(ServerArgs(model_path="dummy", device="cpu"), role="test", ranks=SpawnRanks(world_rank=0, dp_rank=None))


class Streamer(SchedulerOutputStreamer):
    def is_request_level_customized_info_key(self, key):
        return key == "report"


tokenizer = types.SimpleNamespace(eos_token_id=0, additional_stop_token_ids=None, decode=lambda ids, **kwargs: "")


def reports(stream):
    """What leaves the scheduler in each of its messages while an answer of three tokens grows."""
    sent = []
    streamer = Streamer(
        send_to_detokenizer=types.SimpleNamespace(send_output=sent.append), tree_cache=types.SimpleNamespace(),
        server_args=None, is_generation=True, spec_algorithm=SpeculativeAlgorithm.NONE,
        disaggregation_mode=DisaggregationMode.NULL, enable_hicache_storage=lambda: False)
    params = SamplingParams(max_new_tokens=3)
    params.normalize(None)
    req = Req("rid", "", array("q", [1, 2, 3]), params, stream=stream, vocab_size=100)
    req.tokenizer = tokenizer
    for tokens in (1, 2, 3):
        req.output_ids.append(10 + tokens)
        req.customized_info = {"report": [f"known after token {tokens}"]}
        if tokens == 3:
            req.finished_reason = FINISH_LENGTH(3)
        streamer.stream_output([req], False)
    return [unwrap_from_pickle(message.customized_info) if message.customized_info else None for message in sent]


streamed, whole = reports(True), reports(False)
print("streamed:    ", streamed)
print("not streamed:", whole)
assert streamed == [{"report": [["known after token 1"]]}, None, None], "changed: what a stream carries"
assert whole == [{"report": [["known after token 3"]]}], "changed: what a whole answer carries"
PY
"$dir/venv/bin/python" "$dir/run.py"
