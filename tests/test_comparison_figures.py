"""The comparison's figures: nothing is drawn outside the page."""

from __future__ import annotations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qpsft.compare.arms import ARMS
from qpsft.compare.figures import STYLES, _legend


@pytest.mark.parametrize("inches", [4.6, 7.2, 13.8])
def test_the_legend_of_every_arm_fits_the_figure(inches):
    figure = Figure(figsize=(inches, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in ["base", *ARMS]:
        axes.plot([0, 1], marker="o", label=name)
    _legend(figure, axes)
    canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width
    assert len(figure.legends[0].get_texts()) == len(ARMS) + 1


def test_every_arm_has_a_style_of_its_own():
    assert list(STYLES) == list(ARMS)
    assert len({(style["color"], style["linestyle"], style["marker"]) for style in STYLES.values()}) == len(ARMS)
