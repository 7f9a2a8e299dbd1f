"""The client: what it reads of a stream; `kl_divergence` of two tables of log-probabilities, with one bucket for
everything not listed."""

import contextlib
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from kvshare_sched.client.http import Client, kl_divergence


def logs(*rows):
    return [[math.log(p) for p in row] for row in rows]


def random_rows(rng, rows=4, ids=6, listed=0.9):
    table = rng.random((rows, ids)) + 0.01
    return logs(*(table / table.sum(axis=1, keepdims=True) * listed))


def test_equal_tables_have_no_divergence():
    table = random_rows(np.random.default_rng(0))
    assert kl_divergence(table, table) == 0


def test_known_value_with_the_rest_as_one_bucket():
    wanted = 0.5 * math.log(0.5 / 0.25) + 0.2 * math.log(0.2 / 0.1) + 0.3 * math.log(0.3 / 0.65)
    assert kl_divergence(logs((0.5, 0.2)), logs((0.25, 0.1))) == pytest.approx(wanted)


def test_mean_over_positions():
    one, two = kl_divergence(logs((0.5,)), logs((0.25,))), kl_divergence(logs((0.1,)), logs((0.7,)))
    assert kl_divergence(logs((0.5,), (0.1,)), logs((0.25,), (0.7,))) == pytest.approx((one + two) / 2)


def test_never_negative_and_positive_when_different():
    rng = np.random.default_rng(1)
    for listed in (0.5, 0.999):
        for _ in range(50):
            assert kl_divergence(random_rows(rng, listed=listed), random_rows(rng, listed=listed)) > 0


def test_direction_matters():
    p, q = logs((0.9, 0.05)), logs((0.5, 0.45))
    assert kl_divergence(p, q) != pytest.approx(kl_divergence(q, p))


def test_buckets_never_overstate():
    p, q = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.1, 0.2, 0.3, 0.4])
    full = float((p * np.log(p / q)).sum())
    assert 0 < kl_divergence(logs(p[:2]), logs(q[:2])) <= full
    assert kl_divergence(logs(p), logs(q)) == pytest.approx(full)


def test_rounding_above_one_stays_finite():
    table = [[math.log(0.6), math.log(0.4 + 1e-9)]]
    assert kl_divergence(table, table) == 0


@pytest.mark.parametrize(("p", "q"), [(logs((0.5,), (0.5,)), logs((0.5,))), (logs((0.5, 0.2)), logs((0.5,)))])
def test_tables_of_different_shape_are_refused(p, q):
    with pytest.raises(ValueError):
        kl_divergence(p, q)


@pytest.mark.parametrize("text", [{"text": "Yes."}, {}], ids=["tokenizer", "--skip-tokenizer-init"])
def test_a_stream_is_read_with_and_without_text(text, monkeypatch):
    """A server without a tokenizer, as `make gpu-check` starts it for dummy weights, sends ids alone."""
    chunk = text | {"output_ids": [5], "meta_info": {"prompt_tokens": 3, "kvshare": {"outcome": "reused"}}}
    lines = [f"data: {json.dumps(chunk)}".encode(), b"", b"data: [DONE]"]
    client = Client("http://nowhere")
    response = contextlib.nullcontext(SimpleNamespace(iter_lines=lambda: iter(lines)))
    monkeypatch.setattr(client, "post", lambda path, body, **kwargs: response)
    answer = client.generate([1, 2, 3], new_tokens=1, namespace="a")
    assert (answer.token_ids, answer.text, answer.prompt_tokens) == ((5,), text.get("text", ""), 3)
    assert answer.report == {"outcome": "reused"} and answer.tpot_s is None
