"""Published models come out to the last parameter."""

import pytest

from minimoe.core.errors import UserError
from minimoe.cost import published

PUBLISHED = {
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248),
    "mixtral-8x22b": (140_620_634_112, 39_152_031_744),
    "mistral-7b": (7_241_732_096, 7_241_732_096),
    "olmoe-1b-7b": (6_919_161_856, 1_282_017_280),
    "qwen3-30b-a3b": (30_532_122_624, 3_353_032_704),
    "deepseek-moe-16b": (16_375_728_128, 2_828_650_496),
    "switch-base-8": (619_339_008, 222_977_280),
    "switch-base-128": (7_415_217_408, 224_083_200),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_come_out_to_the_last_parameter(name):
    found = published.named(name)
    assert (found.total, found.active) == PUBLISHED[name]


def test_the_parts_of_mixtral_are_those_of_its_layers():
    parts = {part.name: part for part in published.named("mixtral-8x7b").parts}
    assert parts["attention"].total == 32 * 41_943_040
    assert parts["experts"].total == 32 * 8 * 176_160_768
    assert parts["experts"].active == 32 * 2 * 176_160_768


def test_the_rumour_is_220_times_eight_minus_seven_shares():
    assert published.rumoured_8x220b(0.0).total == 1_760_000_000_000
    assert published.rumoured_8x220b(0.2216).total / 1e12 == pytest.approx(1.42, abs=0.005)
    assert published.rumoured_8x220b(0.2216).active / 1e9 == pytest.approx(391, abs=0.5)
    assert published.rumoured_8x220b(1.0).total == published.rumoured_8x220b(1.0).active == 220_000_000_000
    with pytest.raises(UserError, match="shared 1.5 is not a fraction"):
        published.rumoured_8x220b(1.5)
