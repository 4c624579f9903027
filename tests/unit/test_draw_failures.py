"""Which scans of a model are shown as its failures."""

from __future__ import annotations

import math
from typing import cast

from tools.draw_failures import Outcome, worst
from wmh_lora.report.error_maps import Example


def outcome(dice: float, reference_ml: float, found_ml: float) -> Outcome:
    return Outcome(dice, reference_ml, found_ml, cast(Example, None))


def test_the_lowest_dice_and_the_most_found_where_there_is_nothing() -> None:
    good, poor, middle = outcome(0.9, 20, 21), outcome(0.3, 4, 1), outcome(0.6, 9, 8)
    tiny = outcome(0.1, 0.2, 0.4)
    clean, noisy = outcome(math.nan, 0, 0), outcome(0.0, 0, 3)
    everything = [good, clean, tiny, poor, noisy, middle]
    assert worst(everything, 3) == [poor, middle, noisy]
    assert worst([good, poor, middle], 2) == [poor, middle]
