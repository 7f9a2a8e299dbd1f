"""What our hooks lean on in SGLang's scheduler, as functions that raise AssertionError with what they found.

They take SGLang's own objects and change nothing, so any test may call them. `adder` is the pass's PrefillAdder once it
is done; `batch` its ScheduleBatch, before memory is taken for it (`memory`) or at any time while it runs.
"""

from __future__ import annotations

from collections.abc import Iterable

ROWS = 8  # rows of one pass for every token of --chunked-prefill-size


def prompts(batch) -> list:
    """The requests of a batch whose prompts are computed; in a mixed one others decode."""
    decoding = {id(req) for req in batch.decoding_reqs or ()}
    return [req for req in batch.reqs if id(req) not in decoding]


def cut_prompts(batch) -> None:
    """At most one prompt of a batch is unfinished, and it is the one the scheduler goes on with.

    Any other would be answered from the chunk that ran, and its answer's KV published under the rest of its prompt.
    """
    cut = [req for req in prompts(batch) if req.extend_end < len(req.full_untruncated_fill_ids)]
    assert len(cut) <= 1, f"{len(cut)} prompts are cut in one pass: {_pieces(cut)}"
    assert all(req is batch.chunked_req for req in cut), f"cut and not gone on with: {_pieces(cut)}"


def waiting_chunk(scheduler, batch) -> None:
    """A cut prompt that sits a pass out has the pass to itself: SGLang counts its chunk as running in any batch."""
    cut = scheduler.chunked_req
    assert cut is None or cut in batch.reqs, f"{_pieces(prompts(batch))} run while {cut.rid} waits for memory"


def pieces(batch) -> None:
    """Every request of a pass computes something, and nothing beyond its prompt."""
    bad = [r for r in prompts(batch) if not r.prefix_len < r.extend_end <= len(r.full_untruncated_fill_ids)]
    assert not bad, f"nothing or too much is computed: {_pieces(bad)}"


def budget(adder) -> None:
    """A pass is charged what it had and, for rounding, less than a page more; so SGLang's limits still hold."""
    left = adder.rem_chunk_tokens
    assert left is None or left > -adder.page_size, f"{-left} tokens over budget: {_pieces(adder.can_run_list)}"


def rows(batch, chunk: int) -> None:
    """A pass holds a bounded multiple of the rows that SGLang has kept memory for, however little reuse computes."""
    found = sum(req.extend_len for req in prompts(batch))
    assert found <= ROWS * chunk, f"{found} rows in one pass with chunks of {chunk}: {_pieces(prompts(batch))}"


def memory(batch) -> None:
    """What is free or can be evicted covers what the pass will take; SGLang ends the server otherwise."""
    free, taken = _free(batch.tree_cache), _pages(batch, ((r.prefix_len, r.extend_end) for r in prompts(batch)))
    assert taken <= free, f"{taken} tokens wanted, {free} free or evictable: {_pieces(prompts(batch))}"


def memory_of_the_rest(batch) -> None:
    """The same for the rest of the cut prompt: it goes on in every pass until it is through, and is never retracted.

    True as long as nothing decodes meanwhile (mixed chunks, --prefill-decode-interval), or it decodes what was guessed.
    """
    whole = ((r.prefix_len, len(r.full_untruncated_fill_ids)) for r in prompts(batch))
    free, taken = _free(batch.tree_cache), _pages(batch, whole)
    assert taken <= free, f"{taken} tokens wanted in the end, {free} free or evictable: {_pieces(prompts(batch))}"


def _free(cache) -> int:
    return cache.token_to_kv_pool_allocator.available_size() + cache.full_evictable_size()


def _pages(batch, pieces: Iterable[tuple[int, int]]) -> int:
    """Tokens of the pages that are new when each piece [start, end) is added."""
    page = batch.token_to_kv_pool_allocator.page_size
    return sum(-(-end // page) - -(-start // page) for start, end in pieces) * page


def _pieces(reqs) -> str:
    return str([(r.rid, r.prefix_len, r.extend_end, len(r.full_untruncated_fill_ids)) for r in reqs])
