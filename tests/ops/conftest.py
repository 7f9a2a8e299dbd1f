"""Tests of kernels run where their kernels do: on a GPU (`--device cuda`), Triton's also in its interpreter."""

import os


def pytest_collection_modifyitems(config, items):
    on_gpu = config.getoption("--device").startswith("cuda")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    left_out = [
        item
        for item in items
        if (item.get_closest_marker("gpu") and not on_gpu)
        or (item.get_closest_marker("triton") and not (on_gpu or interpreted))
        or (item.get_closest_marker("cpu") and (on_gpu or interpreted))
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
