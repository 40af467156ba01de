"""The bars of the statistics page."""

from collections import Counter
from xml.etree import ElementTree

import pytest

from dali_pipelines.prepare.charts import counts, distribution, number, to_picture, to_svg
from dali_pipelines.prepare.stats import kind_of, summary_of


@pytest.mark.parametrize("values", [[3], [1, 1, 1], [1, 2, 3, 100], [0.001, 5, 900.0], [0, 1e6], list(range(1000))])
def test_every_value_is_in_a_bar(values):
    chart = distribution("t", values)
    assert sum(height for _, height in chart.bars) == len(values)


def test_names_that_are_rare_share_a_bar():
    chart = counts("t", Counter({f"name {i}": 100 - i for i in range(20)}))
    assert len(chart.bars) == 8 and chart.bars[-1] == ("13 others", sum(100 - i for i in range(7, 20)))
    assert len(counts("t", Counter({str(i): 1 for i in range(8)})).bars) == 8


def test_what_users_wrote_is_escaped():
    svg = to_svg(counts("<b>&", Counter({"<script>": 3, "é…": 1})))
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert "<script>" not in svg


def test_nothing_at_all_is_drawn_too():
    charts = [distribution("t", []), counts("u", Counter())]
    assert to_picture(charts, 2).size == (800, 240)
    assert all(ElementTree.fromstring(to_svg(chart)) is not None for chart in charts)


@pytest.mark.parametrize(
    ("value", "said"),
    [(3, "3"), (123456, "123,456"), (1234.5, "1.23k"), (2.5e6, "2.5M"), (0.12345, "0.123"), (3e9, "3G")],
)
def test_numbers_are_short(value, said):
    assert number(value) == said


def test_reasons_of_one_kind_are_counted_together():
    one = kind_of("/data/a 1/x.mp4: no such file")
    assert (
        kind_of("too large: 1920x1080 pixels, data.max_source_pixels is 5")
        == "too large: N pixels, data.max_source_pixels is N"
    )
    assert kind_of("same files and text as 00000003_a") == kind_of("same files and text as 00000009")
    assert one.endswith("no such file")


def test_summary():
    found = summary_of([1, 2, 3, 10])
    assert (found["count"], found["sum"], found["mean"], found["p50"]) == (4, 16, 4, 2.5)
    assert summary_of([]) == {"count": 0}
