"""Drawings: every lesion in a bar, every scan a dot, all inside the picture."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from wmh_lora.report.html_charts import Dot, size_histogram, volume_strip


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def test_histogram_counts_every_lesion_once() -> None:
    volumes = [0.005, 0.01, 0.02, 0.2, 0.25, 0.3, 5.0, 10.0, 80.0]
    svg = parsed(size_histogram(volumes))
    counts = [int(str(text.text)) for text in svg.iter("text") if text.get("class") == "value"]
    assert counts == [1, 2, 0, 2, 1, 0, 1, 2]
    heights = [float(bar.get("height", "")) for bar in svg.iter("rect")]
    assert [height > 0 for height in heights] == [count > 0 for count in counts]
    assert heights[1] == max(heights)
    assert "2 of ≥10 mL" in str(svg.get("aria-label"))


def test_histogram_of_nothing() -> None:
    assert parsed(size_histogram([])).get("aria-label") == "Lesions by volume: none"


@pytest.mark.parametrize("volumes", [[0.0], [0.02], [3.0, 3.0], [0.0, 0.1, 7.0, 990.0]])
def test_strip_keeps_every_dot_inside(volumes: list[float]) -> None:
    dots = [Dot(f"s{n}", v, None, v > 900) for n, v in enumerate(volumes)]
    svg = parsed(volume_strip(dots, 0.1))
    width, height = (float(v) for v in str(svg.get("viewBox")).split()[2:])
    marks = [e for e in svg.iter() if "dot" in str(e.get("class", ""))]
    assert len(marks) == len(volumes)
    for mark in marks:
        x = mark.get("cx") or re.findall(r"M([\d.]+)", str(mark.get("d")))[0]
        assert 0 <= float(x) <= width
        assert 0 <= float(mark.get("cy") or 1) <= height


def test_strip_orders_by_volume_and_links() -> None:
    dots = [Dot("<b>", 9.0, "b.html", False), Dot("a", 1.0, "a.html", False)]
    svg = parsed(volume_strip(dots, 0.1))
    places = [float(str(e.get("cx"))) for e in svg.iter("circle")]
    assert places == sorted(places)
    assert [e.get("href") for e in svg.iter("a")] == ["a.html", "b.html"]


def test_equal_volumes_are_stacked() -> None:
    svg = parsed(volume_strip([Dot(f"s{n}", 2.0, None, False) for n in range(4)], 0.1))
    assert len({e.get("cy") for e in svg.iter("circle")}) == 4


def test_dots_of_similar_volumes_do_not_cover_each_other() -> None:
    volumes = 10.0 + 0.13 * np.arange(40.0)
    svg = parsed(volume_strip([Dot(f"s{v}", float(v), None, False) for v in volumes], 0.1))
    at = np.array([[float(str(e.get(k))) for k in ("cx", "cy")] for e in svg.iter("circle")])
    apart = np.linalg.norm(at[:, None] - at[None], axis=-1)[~np.eye(len(at), dtype=bool)]
    assert apart.min() > 9.8  # a dot is 9 wide
