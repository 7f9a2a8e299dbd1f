"""Model folders that all engine tests share. Each engine is started by its test: that takes half a second."""

import logging
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # `bench`, `models`: tests/ is no package

import models


@pytest.fixture(scope="session")
def deep(tmp_path_factory) -> Path:
    """An ordinary random Llama: what is borrowed deviates."""
    return models.write_llama(tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="session")
def flat(tmp_path_factory) -> Path:
    """A Llama whose KV does not depend on context: reuse must be exact."""
    return models.write_llama(tmp_path_factory.mktemp("flat"), flat=True)


@pytest.fixture(autouse=True)
def quiet():
    """SGLang logs every pass; failures carry what matters."""
    logger = logging.getLogger("sglang")
    before = logger.level
    logger.setLevel(logging.WARNING)
    yield
    logger.setLevel(before)


@pytest.fixture(scope="session")
def other(tmp_path_factory) -> Path:
    """Other weights of the same shapes."""
    return models.write_llama(tmp_path_factory.mktemp("other"), seed=1)
