#!/usr/bin/env bash
# sglang 0.5.23: with more than 128 requests waiting, `lpm` serves neither the longest match nor the first comer.
#
# Expected: `--schedule-policy lpm` puts the longest cached prefix first. When the queue is long, SGLang falls back to
#   first come, first served, as the name in the code says.
# Happens: the fallback only stops sorting. The list was sorted in place while it was short and keeps that order:
#   whoever came first with a short match still stands behind all who came later with a longer one, and who comes while
#   the queue is long stands last, also with the longest match of all.
# Matters: under load, where order counts most, a benchmark or simulator that takes stock's order for either of the two
#   is wrong, and so is an extension's scheduler that leans on the order of the waiting list.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
source "$here/lib/sglang-cpu.sh"
sglang_cpu "$dir/venv"

cat > "$dir/run.py" <<'PY'
from array import array
from importlib.metadata import version

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.schedule_policy import SchedulePolicy
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.runtime_context import publish
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs

print("sglang", version("sglang"))
publish(ServerArgs(model_path="dummy", device="cpu", schedule_policy="lpm"), role="test")
cached = array("q", range(400))
tree = RadixCache.create_simulated()
tree.insert(InsertParams(key=RadixKey(token_ids=cached, extra_key=None), value=torch.arange(400)))


def request(number, match):
    """The request that came as `number`, whose first `match` tokens are cached."""
    own = array("q", range(10_000 + 100 * number, 10_020 + 100 * number))
    return Req(str(number), "", cached[:match] + own, SamplingParams())


policy = SchedulePolicy("lpm", tree, False, False, False)
queue = [request(number, 2 * number) for number in range(128)]  # later ones match more
policy.calc_priority(queue)
print("128 waiting: first", [r.rid for r in queue[:3]], "last", [r.rid for r in queue[-3:]])
longest = [r.rid for r in queue]
queue.append(request(128, 400))  # the next one matches most
policy.calc_priority(queue)
order = [r.rid for r in queue]
print("129 waiting: first", order[:3], "last", order[-3:])
print("place of request 0, the first to come:", order.index("0") + 1)
print("place of request 128, the longest match:", order.index("128") + 1)
assert longest == [str(n) for n in reversed(range(128))], "changed: lpm below the limit"
assert order != sorted(order, key=int), "changed: first come, first served above the limit"
assert order == [*longest, "128"], "changed: the order above the limit"
PY
"$dir/venv/bin/python" "$dir/run.py"
