"""Labels cover nothing and stay within the frame, however crowded the points."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from jquant.sweep.labels import Box, place_labels

FRAME = Box(0, 0, 400, 300)
RADIUS = 4.0


@pytest.mark.parametrize(("seed", "count"), [(seed, count) for seed in range(5) for count in (1, 10, 60)])
def test_no_label_covers_a_label_a_point_or_an_obstacle(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    points = [(float(x), float(y)) for x, y in rng.uniform((10, 10), (390, 290), (count, 2))]
    wall = Box(190, 0, 192, 300)
    placed = place_labels(points, [(50.0, 10.0)] * count, [30.0] * count, frame=FRAME, obstacles=[wall], radius=RADIUS)
    boxes = [box for box in placed if box is not None]
    dots = [Box(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in points]
    assert len(placed) == count
    assert len(boxes) >= min(count, 10) * 0.8
    assert all(box.within(FRAME) and not box.overlaps(wall) for box in boxes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert not any(box.overlaps(dot) for box in boxes for dot in dots)


def test_a_lone_point_has_its_label_in_the_wanted_direction() -> None:
    for degrees, east, north in ((0, 1, 0), (90, 0, 1), (180, -1, 0), (270, 0, -1)):
        (box,) = place_labels([(200, 150)], [(40, 10)], [degrees], frame=FRAME, obstacles=[], radius=RADIUS)
        assert box is not None
        assert np.sign(round(box.centre[0] - 200, 6)) == east
        assert np.sign(round(box.centre[1] - 150, 6)) == north


def test_a_point_without_a_free_place_has_no_label() -> None:
    assert place_labels([(200, 150)], [(40, 10)], [0], frame=FRAME, obstacles=[FRAME], radius=RADIUS) == [None]


def test_box_arithmetic() -> None:
    box = Box(0, 0, 2, 1)
    assert not box.overlaps(Box(2, 0, 3, 1))  # a shared side is no shared area
    assert box.overlaps(Box(1.9, 0.9, 3, 3))
    assert box.centre == (1, 0.5)
    assert box.distance((1, 0.2)) == 0
    assert box.distance((5, 5)) == 5
