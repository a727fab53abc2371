"""Places labels beside points so that none covers another label, its leader line, a point, or an obstacle."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """An upright rectangle, y upward."""

    left: float
    bottom: float
    right: float
    top: float

    @property
    def centre(self) -> tuple[float, float]:
        """The middle."""
        return (self.left + self.right) / 2, (self.bottom + self.top) / 2

    def overlaps(self, other: Box) -> bool:
        """Whether the two share some area."""
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )

    def distance(self, point: tuple[float, float]) -> float:
        """From a point to the nearest place of the box; 0 inside."""
        x, y = point
        return math.hypot(max(self.left - x, 0, x - self.right), max(self.bottom - y, 0, y - self.top))

    def within(self, other: Box) -> bool:
        """Whether no part lies outside the other."""
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.bottom <= self.bottom
            and self.top <= other.top
        )


_TURNS = (0, 20, -20, 45, -45, 70, -70, 90, -90, 110, -110, 135, -135, 160, -160, 180)  # degrees
_DISTANCES = (0.4, 1.4, 2.9, 4.9, 7.4, 10.4)  # text heights between a point and its label


def place_labels(
    points: list[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    toward: Sequence[float],
    *,
    frame: Box,
    obstacles: Sequence[Box],
    radius: float,
) -> list[Box | None]:
    """For each point in turn the nearest free place for its label, joined to it by a straight leader line.

    A place is free where the label covers nothing and its leader crosses no other point or label. Of these a place
    that lies nearer to its own point than to any other is taken first.

    Args:
        points: [n] centres, in any unit that sizes and the frame share; the first are placed first.
        sizes: [n] width and height of each label.
        toward: [n] the direction to try first, in degrees from east towards north.
        frame: labels lie within.
        obstacles: what labels may not cover beside the points.
        radius: of a point.

    Returns:
        [n] the label's box, or None where no place was free.
    """
    dots = [Box(x - radius, y - radius, x + radius, y + radius) for x, y in points]
    taken = [*dots, *obstacles]
    labels: list[Box] = []
    placed: list[Box | None] = []
    for index, point in enumerate(points):
        others = points[:index] + points[index + 1 :]
        crossed = [dot for dot in dots if not dot.overlaps(dots[index])] + labels
        free = [
            box
            for box in _candidates(point, sizes[index], toward=toward[index], radius=radius)
            if box.within(frame)
            and not any(box.overlaps(other) for other in taken)
            and not any(step.overlaps(other) for step in _leader(point, box) for other in crossed)
        ]
        clear = (box for box in free if all(box.distance(point) <= box.distance(other) for other in others))
        box = next(clear, free[0] if free else None)
        placed.append(box)
        if box is not None:
            labels.append(box)
            taken += [box, *_leader(point, box)]
    return placed


def _candidates(
    point: tuple[float, float], size: tuple[float, float], *, toward: float, radius: float
) -> Iterator[Box]:
    """Places around a point, the nearest and those in the wanted direction first."""
    width, height = size
    for far in _DISTANCES:
        distance = radius + far * height
        for turn in _TURNS:
            angle = math.radians(toward + turn)
            x = point[0] + math.cos(angle) * (distance + width / 2)
            y = point[1] + math.sin(angle) * (distance + height / 2)
            yield Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _leader(point: tuple[float, float], box: Box, *, steps: int = 24) -> list[Box]:
    """The line from a point to its label's middle, as small boxes as far as the label."""
    (x0, y0), (x1, y1) = point, box.centre
    line = [
        Box(x - 0.5, y - 0.5, x + 0.5, y + 0.5)
        for x, y in ((x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps))
    ]
    return [step for step in line if not step.overlaps(box)]
