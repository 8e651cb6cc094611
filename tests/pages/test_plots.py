"""How curves become figures. What the report draws with them is tested in tests/test_report.py."""

import numpy as np
import pytest

from xlam_jax.pages import plots


@pytest.mark.parametrize("seed", range(4))
def test_thinning_keeps_every_extreme(seed):
    rng = np.random.default_rng(seed)
    steps = np.cumsum(rng.integers(1, 4, 20_000))
    values = rng.normal(size=20_000)
    breaks = rng.random(20_000) < 1e-4
    values[rng.integers(20_000)] = 50.0
    line = plots.Line("a", steps, values, breaks=breaks)
    thinned = plots.thin(line, 100)
    assert len(thinned.steps) <= 2 * 100 + 2
    np.testing.assert_array_equal(values[np.searchsorted(steps, thinned.steps)], thinned.values)
    assert (thinned.values.min(), thinned.values.max()) == (values.min(), values.max())
    assert (thinned.steps[0], thinned.steps[-1]) == (steps[0], steps[-1])
    width = (steps[-1] - steps[0] + 1) / 100
    for at in range(100):  # each stretch on its own
        whole, kept = (
            one.values[(one.steps >= steps[0] + at * width) & (one.steps < steps[0] + (at + 1) * width)]
            for one in (line, thinned)
        )
        assert (whole.min(), whole.max()) == (kept.min(), kept.max())
    assert thinned.breaks is not None
    crossed = np.cumsum(breaks)[np.searchsorted(steps, thinned.steps)]
    assert (thinned.breaks[1:] == (np.diff(crossed) > 0)).all()


def test_a_figure_without_points_is_none():
    assert plots.make_plot("a", "b", [plots.Line("c", np.zeros(0, int), np.zeros(0))], (0, 1)) is None


def test_a_figure_has_the_curves_from_back_to_front():
    steps, values = np.arange(1, 101), np.linspace(1.0, 2.0, 100)
    lines = [
        plots.Line("held-out", steps[::10], values[::10], 1, "points"),
        plots.Line("train", steps, values, 8),
        plots.Line("train", steps, values, 0, "faint"),
    ]
    plot = plots.make_plot("Loss", "nats", lines, (1, 100))
    assert plot is not None
    assert [stroke.css for stroke in plot.strokes] == ["faint c0", "line c0 dash", "join c1", "points c1"]
    assert [stroke.name for stroke in plot.strokes] == [None, "train", None, "held-out"]
    assert [[(entry.name, entry.value) for entry in entries] for entries in plot.legend] == [
        [("held-out", "1.909")],
        [("train", "2")],
    ]
    assert plot.description == "Loss, nats, over steps 1 to 100. Last: held-out 1.909; train 2"
    points = plot.strokes[-1].data
    assert points.startswith("M1 ")
    assert points.count("h0") == 10
