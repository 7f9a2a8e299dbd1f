"""Equal cells: the ratio every strategy gets, against hand-computed shares."""

from dataclasses import replace

import pytest

from kvshare_sched.errors import ConfigError
from kvshare_sched.evaluation import methods
from kvshare_sched.methods.registry import names
from kvshare_sched.settings import KVShareConfig

CONFIG = KVShareConfig()


def test_shares_by_hand():
    assert methods.cell_share("dhd", 0.1, 30, CONFIG) == pytest.approx((2 + 28 * 0.1) / 30)
    assert methods.cell_share("dhd", 0.1, 30, replace(CONFIG, check_layer=3)) == pytest.approx((4 + 26 * 0.1) / 30)
    assert methods.cell_share("epic", 0.15, 30, CONFIG) == pytest.approx(0.15)
    assert methods.cell_share("cacheblend", 0.0, 30, CONFIG) == pytest.approx(2 / 30)
    assert methods.cell_share("dhd", 1.0, 30, CONFIG) == 1


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 30])
def test_one_ratio_means_as_many_cells_to_every_rule_that_checks(layers):
    """Filtering in steps computes what one selection does; in a model of one layer both compute everything."""
    one, steps = (methods.cell_share(name, 0.1, layers, CONFIG) for name in ("dhd", "cacheblend"))
    assert one == pytest.approx(steps) and (one == 1) == (layers == 1)


@pytest.mark.parametrize("strategy", ["dhd", "cacheblend", "epic", "random"])
@pytest.mark.parametrize("share", [0.12, 0.2, 0.45])
def test_the_ratio_gives_the_share_back(strategy, share):
    ratio = methods.ratio_for(strategy, share, 30, CONFIG)
    assert methods.cell_share(strategy, ratio, 30, CONFIG) == pytest.approx(share, abs=2e-4)


def test_a_share_below_the_check_layers_means_ratio_0():
    assert methods.ratio_for("dhd", 0.05, 30, CONFIG) == 0


def test_methods_of_a_run():
    found = methods.resolve(["naive", "epic", "dhd", "default"], [0.1, 0.25], 30, CONFIG)
    assert [m.name for m in found] == ["naive", "epic", "epic@0.25", "dhd", "dhd@0.25", "default"]
    by_name = {m.name: m for m in found}
    assert by_name["default"].reuse is True and by_name["naive"].reuse == {"strategy": "naive"}
    assert by_name["dhd@0.25"].reuse["ratio"] == pytest.approx(0.25, abs=1e-4)
    assert by_name["epic"].reuse["ratio"] == pytest.approx((2 + 28 * 0.1) / 30, abs=1e-4)
    assert by_name["epic@0.25"].family == "epic" and by_name["epic@0.25"].budget == 0.25


def test_every_method_is_a_setting_the_server_knows():
    for settings in methods.METHODS.values():
        assert settings.get("strategy", "dhd") in names()
        CONFIG.for_request(settings)


@pytest.mark.parametrize(("wrong", "ratios"), [(["eipc"], [0.1]), (["epic"], [0.0]), (["epic"], [float("nan")])])
def test_what_does_not_exist_is_refused(wrong, ratios):
    with pytest.raises(ConfigError, match="accepted"):
        methods.check_names(wrong, ratios)
