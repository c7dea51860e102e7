"""The loss curve in plain characters: where its points lie, what its ends say, that it fits a terminal."""

from __future__ import annotations

import math

import pytest

from edgeft.reporting.curve import HEIGHT, curve_lines, last_fall


def test_a_long_run_fits_eighty_columns() -> None:
    points = [(step, 4.0 - 3 * step / 5000) for step in range(1, 5001)]
    lines = curve_lines(points, [(2500, 3.0), (5000, 2.0)])
    assert len(lines) == HEIGHT + 3 and max(map(len, lines)) <= 80
    assert all(line.isascii() for line in lines)
    assert lines[0] == "loss, nats a token: . training, o validation"
    plot = [line.partition("|")[2] for line in lines[1:-2]]
    assert plot[0].startswith(".") and plot[-1].rstrip().endswith(".")
    places = [(row, column) for row, line in enumerate(plot) for column, mark in enumerate(line) if mark == "o"]
    assert [column for _, column in places] == [34, 70] and lines[-2].count("-") == 71
    assert lines[-1].rstrip().endswith("step 5,000")


def test_a_falling_line_falls_and_names_its_ends() -> None:
    lines = curve_lines([(1, 2.0), (2, 1.5), (3, 1.0)])
    plot = [line.partition("|")[2] for line in lines[1:-2]]
    columns = [next((row for row, line in enumerate(plot) if line[at : at + 1] == "."), None) for at in range(20)]
    rows = [row for row in columns if row is not None]
    assert rows == sorted(rows) and (rows[0], rows[-1]) == (0, HEIGHT - 1) and len(rows) == 3
    assert lines[1].split("|")[0].strip() == "2" and lines[HEIGHT].split("|")[0].strip() == "1"
    assert "validation" not in lines[0]


def test_a_column_holds_the_mean_of_its_steps() -> None:
    """Steps that jump between two losses make a flat line halfway."""
    points = [(1, 3.0), *((step, 1.0 + 2 * (step % 2)) for step in range(2, 2000)), (2000, 1.0)]
    plot = [line.partition("|")[2] for line in curve_lines(points)[1:-2]]
    assert max(line.count(".") for line in plot) > 60


def test_too_little_to_see_anything_in_is_not_drawn() -> None:
    assert curve_lines([]) == [] and curve_lines([(1, 2.0), (2, 1.0)]) == []
    assert curve_lines([(1, math.nan), (2, 1.0), (3, math.inf)]) == []


def test_equal_losses_are_a_flat_line() -> None:
    plot = [line.partition("|")[2] for line in curve_lines([(step, 2.0) for step in range(1, 6)])[1:-2]]
    assert sum("." in line for line in plot) == 1


def test_how_far_the_loss_still_falls_is_by_thirds_of_the_steps() -> None:
    fell = [(step, 4.0 if step <= 10 else 2.0 if step <= 20 else 1.5) for step in range(1, 31)]
    assert last_fall(fell) == pytest.approx(0.25)
    assert last_fall([(step, 1.0) for step in range(1, 31)]) == 0.0
    assert last_fall(fell[:14]) == last_fall([]) == 0.0  # too few to tell
    assert last_fall([*fell, (31, math.nan)]) == pytest.approx(0.25)  # of a step that gave no number
