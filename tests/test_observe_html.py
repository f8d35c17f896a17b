"""Bars of HTML pages."""

import re

import numpy as np

from spmd_train.observe.html import bars, line_chart, stacked_bar


def test_observe_html_names_a_part_of_a_bar_only_where_the_name_has_room():
    text = "".join(stacked_bar({"narrow": 2.0, "wide <one>": 50.0}, whole=100.0, unit="GB"))
    assert re.findall(r">([^<>]*)</span>", text) == ["", "wide &lt;one&gt;"]
    # What a narrow one is, a pointer's rest tells.
    assert "title='narrow: 2.00 GB'" in text and "width:2.00%" in text


def test_observe_html_bars_are_as_long_as_what_they_stand_for():
    text = "".join(bars({"a": (4.0, "4 s"), "b": (1.0, "1 s"), "c": (0.0, "none")}))
    assert re.findall(r"width:([\d.]+)%", text) == ["100.00", "25.00", "0.00"]
    assert "1 s" in text and "none" in text
    assert "width:0.00%" in "".join(bars({"a": (0.0, "0")}))


def test_observe_html_draws_a_power_law_straight_on_logarithmic_axes():
    sizes = (1, 2, 8, 64, 1024)
    text = "".join(line_chart({"law": [(n, 3.0 * n**1.5) for n in sizes]}, logarithmic=True))
    places = np.array(re.findall(r"cx='([\d.]+)' cy='([\d.]+)'", text), dtype=float)
    slopes = np.diff(places[:, 1]) / np.diff(places[:, 0])
    np.testing.assert_allclose(slopes, slopes[0], rtol=0.01)
    ticks = re.findall(r"text-anchor='middle'>([\dk.]+)</text>", text)
    assert ticks == ["1", "2", "4", "8", "16", "32", "64", "128", "256", "512", "1024"]
