#!/usr/bin/env bash
# sglang 0.5.23: a plug-in's hook on an inherited static method passes `self` on to it.
#
# Expected: SGLang's plug-in hooks take any method. For static and class methods the hook registry looks for the decorator
#   and puts it back, so a hook on `TokenToKVPoolAllocator._copy_for_free_group`, a static method that this class inherits,
#   should be called with the arguments of the method.
# Happens: the decorator is looked for in the class's own __dict__ only. For an inherited method it is not found, a plain
#   function is set on the subclass, and every call through `self` has one argument too many and raises TypeError.
#   Registering and applying the hook reports nothing unusual.
# Matters: SGLang moves methods between classes and their bases from release to release. A hook that names the class in use
#   works while the class defines the method itself and fails each call once a base does; it must name the definer.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
source "$here/lib/sglang-cpu.sh"
sglang_cpu "$dir/venv"

cat > "$dir/run.py" <<'PY'
from importlib.metadata import version

import torch
from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

METHOD = "_copy_for_free_group"
print("sglang", version("sglang"))
assert METHOD not in vars(TokenToKVPoolAllocator)
assert isinstance(vars(BaseTokenToKVPoolAllocator)[METHOD], staticmethod)


def free_grouped():
    """Take four slots of eight and give them back in a group, as the scheduler does after a batch."""
    allocator = TokenToKVPoolAllocator(8, torch.float32, "cpu", None, False)
    slots = allocator.alloc(4)
    allocator.free_group_begin()
    try:
        allocator.free(slots)
    except TypeError as error:
        return f"TypeError: {error}"
    allocator.free_group_end()
    return f"{allocator.available_size()} of 8 slots free"


def hook(by):
    calls = []
    target = f"{by.__module__}.{by.__name__}.{METHOD}"
    HookRegistry.register(target, lambda result, *args: calls.append(args), HookType.AFTER)
    HookRegistry.apply_hooks()
    answer = free_grouped()
    print(f"with a hook by the name of {by.__name__}:", answer, "- calls of the hook:", len(calls))
    return answer, len(calls)


plain = free_grouped()
print("without a hook:", plain)
definer, user = hook(BaseTokenToKVPoolAllocator), hook(TokenToKVPoolAllocator)
assert plain == "8 of 8 slots free", "changed: the allocator"
assert definer == (plain, 1), "changed: a hook on a static method of the class that defines it"
assert user[0].startswith("TypeError") and user[1] == 0, "changed: a hook on an inherited static method works"
PY
"$dir/venv/bin/python" "$dir/run.py"
