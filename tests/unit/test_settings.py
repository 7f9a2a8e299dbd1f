"""Every setting: where it comes from, what is refused, and what the refusal says."""

from dataclasses import fields

import pytest

from kvshare_sched import settings as settings_module
from kvshare_sched.errors import ConfigError
from kvshare_sched.methods.registry import names
from kvshare_sched.settings import PRESETS, KVShareConfig

FIELDS = {f.name: f for f in fields(KVShareConfig)}
NUMBERS = [f for f in FIELDS.values() if isinstance(f.default, int | float)]
CHOICES = {"mode": ("off", "discover", "on"), "alpha": ("colsum", "one_query"), "strategy": names()}
CHOICES |= {"repair_order": ("fifo", "lagged", "attention")}
BELOW = [f"KVSHARE_{f.name.upper()}={f.metadata['low'] - 1}" for f in NUMBERS if f.metadata["low"] is not None]


def load(text="", **env):
    """Load from 'A=1 B=2'."""
    return KVShareConfig.load(dict(pair.split("=", 1) for pair in text.split()) | env)


def refusal(*args, **env) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*args, **env)
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(tmp_path, text: str) -> str:
    path = tmp_path / "kvshare.toml"
    path.write_text(text)
    return str(path)


def test_every_setting_has_a_range_or_choices_and_a_reason():
    for item in FIELDS.values():
        limits = item.metadata
        assert limits["reason"], item.name
        free = item.name in ("strategy", "tenant_weights") or limits["unit"] == "path"
        assert limits["choices"] or limits["low"] is not None or free, item.name


def test_nothing_set_gives_the_defaults():
    assert load() == KVShareConfig()
    assert load(PATH="/bin", KVSHARE_CACHE="/tmp/models", KVSHARE_CONFIG="") == KVShareConfig()


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_is_accepted_and_others_are_refused(name):
    for value in CHOICES[name]:
        assert getattr(load(f"KVSHARE_{name.upper()}={value}"), name) == value
    message = refusal(f"KVSHARE_{name.upper()}=bogus")
    assert f"{name}='bogus'" in message and f"KVSHARE_{name.upper()}" in message
    assert ", ".join(CHOICES[name]) in message
    assert "''" in refusal(**{f"KVSHARE_{name.upper()}": ""})


def test_a_near_miss_gets_a_suggestion():
    assert "did you mean cacheblend?" in refusal("KVSHARE_STRATEGY=cacheblnd")
    assert "did you mean ratio?" in refusal("KVSHARE_RATOI=0.1")
    assert "did you mean" not in refusal("KVSHARE_STRATEGY=zzzzzz")


@pytest.mark.parametrize(
    "pair", [*BELOW, "KVSHARE_RATIO=1.01", "KVSHARE_RATIO=inf", "KVSHARE_RATIO=nan", "KVSHARE_WINDOW=257"]
)
def test_out_of_range_is_refused_with_value_range_and_remedy(pair):
    variable, value = pair.split("=")
    name = variable.removeprefix("KVSHARE_").lower()
    message = refusal(pair)
    assert f"{name}={value}" in message and "accepted: " in message and f"Set {variable} " in message
    low, high = FIELDS[name].metadata["low"], FIELDS[name].metadata["high"]
    assert f"{low} <= {name}" in message and (high is None or f"<= {high}" in message)


@pytest.mark.parametrize("item", NUMBERS, ids=lambda f: f.name)
def test_the_bounds_themselves_are_accepted(item):
    for bound in filter(lambda b: b is not None, (item.metadata["low"], item.metadata["high"])):
        around = {"window": f"KVSHARE_MIN_RUN={bound}", "min_run": f"KVSHARE_WINDOW={bound}"}.get(item.name, "")
        assert getattr(load(f"KVSHARE_{item.name.upper()}={bound} {around}"), item.name) == bound


@pytest.mark.parametrize(
    ("pair", "kind"),
    [("KVSHARE_RATIO=ten", "float"), ("KVSHARE_WINDOW=1.5", "int"), ("KVSHARE_WINDOW=", "int")],
)
def test_text_that_is_no_number_is_refused(pair, kind):
    variable, value = pair.split("=")
    message = refusal(pair)
    assert f"{variable}={value!r}" in message and f"valid {kind}" in message and "give a number" in message


def test_unknown_variable_is_refused_with_the_known_names():
    message = refusal("KVSHARE_SPEED=9")
    assert "KVSHARE_SPEED is not a setting" in message and "Remove it or correct it" in message
    assert all(name in message for name in FIELDS)


def test_runs_shorter_than_a_window_are_refused():
    message = refusal("KVSHARE_MIN_RUN=15")
    assert "min_run=15" in message and "window=16" in message and "min_run >= window" in message
    assert "KVSHARE_MIN_RUN" in message and "KVSHARE_WINDOW" in message
    assert load("KVSHARE_MIN_RUN=16").min_run == 16


def test_file_then_environment(tmp_path):
    path = written(tmp_path, 'strategy = "epic"\nratio = 1\nwindow = 8\n')
    from_file = load(KVSHARE_CONFIG=path)
    assert (from_file.strategy, from_file.ratio, from_file.window) == ("epic", 1.0, 8)
    assert isinstance(from_file.ratio, float) and from_file.min_run == KVShareConfig().min_run
    both = load(KVSHARE_CONFIG=path, KVSHARE_WINDOW="12")
    assert (both.strategy, both.window) == ("epic", 12)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("windw = 8", ["windw is not a setting", "did you mean window?"]),
        ('window = "8"', ["window='8'", "type int"]),
        ("window = true", ["window=True", "type int"]),
        ("window = 8.0", ["window=8.0", "type int"]),
        ("ratio = nan", ["ratio=nan", "0.0 <= ratio <= 1.0"]),
        ("mode = 1", ["mode=1", "type str"]),
        ("window = ", ["cannot be read", "TOML"]),
        ("[match]\nwindow = 8", ["match is not a setting"]),
    ],
)
def test_wrong_file_is_refused_by_name(tmp_path, text, fragments):
    path = written(tmp_path, text)
    message = refusal(KVSHARE_CONFIG=path)
    assert all(fragment in message for fragment in fragments), message
    assert path in message or "ratio" in text  # a value error is the setting's, whoever set it


def test_missing_file_is_refused():
    message = refusal(KVSHARE_CONFIG="/nowhere/kvshare.toml")
    assert "KVSHARE_CONFIG='/nowhere/kvshare.toml' cannot be read" in message and "TOML" in message


def test_describe_is_enough_to_set_it_again():
    config = load("KVSHARE_STRATEGY=epic KVSHARE_RATIO=0.15 KVSHARE_MODE=discover KVSHARE_MIN_RUN=48")
    line = config.describe()
    assert "\n" not in line and len(line.split()) == len(FIELDS)
    assert load(" ".join(f"KVSHARE_{k.upper()}={v}" for k, v in (p.split("=") for p in line.split()))) == config


def test_a_request_may_ask_for_its_own_settings():
    config = load(KVSHARE_WINDOW="8")
    asked = config.for_request({"strategy": "epic", "ratio": 1})
    assert (asked.strategy, asked.ratio, asked.window) == ("epic", 1.0, 8) and isinstance(asked.ratio, float)
    assert config.for_request({}) is config


@pytest.mark.parametrize(
    "wishes", [{"window": 8}, {"mode": "off"}, {"strategy": "epik"}, {"ratio": 1.5}, {"ratio": "0.2"}, {"x": 1}]
)
def test_a_wrong_wish_of_a_request_is_refused_by_name(wishes):
    with pytest.raises(ConfigError, match=next(iter(wishes))):
        KVShareConfig().for_request(wishes)


def test_a_preset_sets_what_nobody_set_by_name(tmp_path):
    assert load(KVSHARE_PRESET="quality").ratio == PRESETS["quality"]["ratio"] > KVShareConfig().ratio
    mixed = load(KVSHARE_PRESET="speed", KVSHARE_RATIO="0.5")
    assert (mixed.preset, mixed.ratio, mixed.strategy) == ("speed", 0.5, PRESETS["speed"]["strategy"])
    from_file = load(KVSHARE_CONFIG=written(tmp_path, 'preset = "quality"\n'))
    assert from_file == load(KVSHARE_PRESET="quality")
    assert KVShareConfig().for_request({"preset": "quality"}) == from_file
    assert KVShareConfig().for_request({"preset": "quality", "ratio": 0.2}).ratio == 0.2
    assert KVShareConfig() == load(KVSHARE_PRESET=KVShareConfig().preset)
    assert "quality" in refusal(KVSHARE_PRESET="qualty")


def test_tenant_weights_are_a_list_of_names_and_numbers():
    assert load().weights == {}
    assert load(KVSHARE_TENANT_WEIGHTS="gold=4, free=0.5,").weights == {"gold": 4.0, "free": 0.5}
    assert load(KVSHARE_TENANT_WEIGHTS="a=b=2").weights == {"a=b": 2.0}


@pytest.mark.parametrize("text", ["gold", "gold=", "=3", "gold=many", "gold=0", "gold=-1", "gold=nan", "gold=1e9"])
def test_a_wrong_tenant_weight_is_named(text):
    with pytest.raises(ConfigError, match="tenant_weights.*KVSHARE_TENANT_WEIGHTS"):
        load(KVSHARE_TENANT_WEIGHTS=f"ok=1,{text}")


def test_the_former_name_of_a_method_is_accepted_with_one_warning(caplog):
    settings_module._present_name.cache_clear()
    asked = [KVShareConfig(strategy="kvshare"), KVShareConfig().for_request({"strategy": "kvshare"})]
    assert [config.strategy for config in asked] == ["dhd", "dhd"]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "kvshare" in warning and "dhd" in warning
