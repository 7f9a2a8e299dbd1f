"""kvshare-sched: non-prefix KV reuse and fair, cache-aware ordering for SGLang.

Importing this package is instant: entry points run in every SGLang process, so each module imports
`torch` and `sglang` only when it is used.
"""

__version__ = "0.1.0"
