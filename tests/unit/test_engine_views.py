"""Views: which there are, how they are averaged, and which slices they are spent on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wmh_lora.config import TTA_MODES, TtaMode
from wmh_lora.engine_views import (
    EVIDENCE,
    VIEWS,
    JoinedProgress,
    Look,
    Seen,
    ViewKey,
    average_views,
    slices_with_evidence,
    turn,
    turn_back,
)

SHAPE = (9, 8, 6)


def number(view: ViewKey) -> int:
    return VIEWS["d4"].index(view)


class Answers:
    """Fixed answers by view and slice; remembers what was asked."""

    def __init__(self, seed: int = 0, quiet: Sequence[int] = ()) -> None:
        rng = np.random.default_rng(seed)
        self.maps = rng.random((8, *SHAPE), dtype=np.float32) * 0.5 + EVIDENCE
        self.maps[:, list(quiet)] *= 0.1 * EVIDENCE
        self.asked: list[tuple[ViewKey, int]] = []

    def __call__(self, indices: Sequence[int], view: ViewKey) -> Seen:
        self.asked += [(view, index) for index in indices]
        structures = {}
        if view == (0, False):
            structures["brain"] = np.full((len(indices), *SHAPE[1:]), 200, np.uint8)
        return Seen(self.maps[number(view)][list(indices)], structures)


def mean(answers: Answers, tta: TtaMode) -> Any:
    return answers.maps[[number(view) for view in VIEWS[tta]]].mean(axis=0)


class TestViews:
    @pytest.mark.parametrize(("tta", "count"), [("none", 1), ("flip", 4), ("d4", 8)])
    def test_are_distinct(self, tta: TtaMode, count: int) -> None:
        picture = torch.arange(16.0).reshape(1, 1, 4, 4)
        views = {tuple(turn(picture, view).flatten().tolist()) for view in VIEWS[tta]}
        assert len(VIEWS[tta]) == len(views) == count

    def test_flips_are_the_flips(self) -> None:
        picture = torch.arange(12.0).reshape(1, 1, 3, 4)
        found = [turn(picture, view) for view in VIEWS["flip"]]
        for dims in ((), (-1,), (-2,), (-2, -1)):
            assert any(torch.equal(picture.flip(dims), view) for view in found)

    @pytest.mark.parametrize("view", VIEWS["d4"])
    def test_are_undone_exactly(self, view: ViewKey) -> None:
        pictures = torch.rand(2, 3, 8, 16)
        assert torch.equal(turn_back(turn(pictures, view), view), pictures)

    @pytest.mark.parametrize("tta", TTA_MODES)
    def test_plain_one_comes_first(self, tta: TtaMode) -> None:
        assert VIEWS[tta][0] == (0, False)


class TestAverage:
    @pytest.mark.parametrize("tta", TTA_MODES)
    @pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
    def test_is_the_mean_and_the_deviation(self, tta: TtaMode, batch_size: int) -> None:
        answers = Answers()
        maps = average_views(answers, SHAPE, VIEWS[tta], batch_size)
        np.testing.assert_allclose(maps.probability, mean(answers, tta), rtol=1e-6)
        assert len(answers.asked) == len(set(answers.asked)) == len(VIEWS[tta]) * SHAPE[0]
        if tta == "none":
            assert maps.deviation is None
        else:
            assert maps.deviation is not None
            of_views = answers.maps[[number(view) for view in VIEWS[tta]]]
            np.testing.assert_allclose(maps.deviation, of_views.std(axis=0), atol=1e-6)
        assert (maps.structures["brain"] == 200).all()

    def test_batches_do_not_change_a_bit(self) -> None:
        found = [
            average_views(Answers(), SHAPE, VIEWS["d4"], size, reach=1).probability
            for size in (1, 3, 9)
        ]
        np.testing.assert_array_equal(found[0], found[1])
        np.testing.assert_array_equal(found[0], found[2])

    def test_slices_that_are_not_shown_are_zero_and_cost_nothing(self) -> None:
        answers = Answers()
        shown = np.ones(SHAPE[0], np.bool_)
        shown[[0, 4, 8]] = False
        maps = average_views(answers, SHAPE, VIEWS["flip"], 2, shown=shown)
        expected = mean(answers, "flip") * shown[:, None, None]
        np.testing.assert_allclose(maps.probability, expected, rtol=1e-6)
        assert {index for _, index in answers.asked} == {1, 2, 3, 5, 6, 7}
        assert not maps.structures["brain"][~shown].any()

    def test_progress_ends_at_its_total(self) -> None:
        steps: list[tuple[int, int]] = []
        answers = Answers(quiet=range(4, 9))
        average_views(
            answers,
            SHAPE,
            VIEWS["d4"],
            2,
            reach=1,
            progress=lambda done, total: steps.append((done, total)),
        )
        assert steps[-1] == (len(answers.asked), len(answers.asked))
        assert all(done <= total for done, total in steps)
        assert [done for done, _ in steps] == sorted(done for done, _ in steps)


class TestAdaptive:
    @given(quiet=st.sets(st.integers(0, SHAPE[0] - 1)), reach=st.integers(1, 3))
    def test_slices_with_evidence_keep_every_view(self, quiet: set[int], reach: int) -> None:
        answers = Answers(quiet=sorted(quiet))
        look: Look = answers
        exact = average_views(look, SHAPE, VIEWS["d4"], 2)
        answers.asked.clear()
        maps = average_views(look, SHAPE, VIEWS["d4"], 2, reach=reach)
        loud = [index for index in range(SHAPE[0]) if index not in quiet]
        near = [i for i in range(SHAPE[0]) if any(abs(i - index) <= reach for index in loud)]
        far = [i for i in range(SHAPE[0]) if i not in near]
        np.testing.assert_array_equal(maps.probability[near], exact.probability[near])
        np.testing.assert_array_equal(maps.probability[far], answers.maps[0][far])
        assert maps.deviation is not None
        assert not maps.deviation[far].any()
        assert len(answers.asked) == SHAPE[0] + 7 * len(near)

    def test_bound_itself_is_evidence(self) -> None:
        probability = np.zeros((5, 2, 2), np.float32)
        probability[1, 0, 0] = EVIDENCE
        assert slices_with_evidence(probability, 1).tolist() == [True, True, True, False, False]
        probability[1, 0, 0] = np.nextafter(np.float32(EVIDENCE), np.float32(0.0))
        assert not slices_with_evidence(probability, 1).any()


def test_joined_progress_ends_where_a_scan_needs_no_further_look() -> None:
    told: list[tuple[int, int]] = []
    progress = JoinedProgress(lambda done, total: told.append((done, total)), runs=3)
    part = progress.part()
    part(0, 24)
    part(24, 24)
    assert told[-1] == (24, 72)
    progress.finish()
    assert told[-1] == (24, 24)
