#!/usr/bin/env bash
# sglang 0.5.23: an AFTER hook on an asynchronous method is called before the method has run.
#
# Expected: an AFTER hook gets the method's result and may return another one. So on the coroutine method
#   `TokenizerManager._tokenize_texts` it should get the token ids once they are there.
# Happens: the wrapper is an ordinary function. The hook gets the coroutine, before its first line has run, and what it
#   wants to know of the result is not there yet. The wrapped method also no longer counts as a coroutine function.
# Matters: nearly everything in SGLang's tokenizer process is asynchronous. A plug-in that counts tokens, times a call or
#   rewrites an answer there needs an AROUND hook that is itself `async`; AFTER measures nothing and raises no alarm.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
source "$here/lib/sglang-cpu.sh"
sglang_cpu "$dir/venv"

cat > "$dir/run.py" <<'PY'
import asyncio
import inspect
import types
from importlib.metadata import version

from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

print("sglang", version("sglang"))
was = inspect.iscoroutinefunction(TokenizerManager._tokenize_texts)
order = []


class Words:
    """A tokenizer of one id a word."""

    is_fast = False
    eos_token_id = None

    def encode(self, text):
        order.append("method")
        return list(range(len(text.split())))


def after(result, *args, **kwargs):
    order.append("hook")
    seen.append(result)


seen = []
HookRegistry.register("sglang.srt.managers.tokenizer_manager.TokenizerManager._tokenize_texts", after, HookType.AFTER)
HookRegistry.apply_hooks()
manager = object.__new__(TokenizerManager)
manager.tokenizer, manager.async_dynamic_batch_tokenizer = Words(), None
manager.model_config = types.SimpleNamespace(is_embedding_gemma=False)
answer = asyncio.run(manager._tokenize_texts("four words of text"))
now = inspect.iscoroutinefunction(TokenizerManager._tokenize_texts)
print("the caller gets", answer)
print("the AFTER hook got a", type(seen[0]).__name__, "and ran in this order:", order)
print("a coroutine function before the hook:", was, "and after:", now)
assert answer == ([0, 1, 2, 3], None), "changed: the method itself"
assert order == ["hook", "method"] and inspect.iscoroutine(seen[0]), "changed: AFTER waits for the result"
assert was and not now, "changed: the wrapper is a coroutine function"
PY
"$dir/venv/bin/python" "$dir/run.py"
