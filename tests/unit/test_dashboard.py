"""The Grafana dashboard and the docs: every series that they name is one that is exported, and none is forgotten."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from actors.metrics import series_names
from raycore.metrics import METRICS, POOL_TAGS

REPOSITORY = Path(__file__).parent.parent.parent
SERIES = re.compile(r"ray_raycore_[a-z_]+")


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads(resources.files("raycore").joinpath("dashboards/raycore.json").read_text(encoding="utf-8"))


def queries(dashboard: dict[str, Any]) -> list[str]:
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    found += [variable["definition"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    return found + [annotation["expr"] for annotation in dashboard["annotations"]["list"]]


def test_every_query_is_of_a_series_that_is_exported(dashboard: dict[str, Any]) -> None:
    named = {name for query in queries(dashboard) for name in SERIES.findall(query)}
    assert named <= series_names()
    assert all(SERIES.search(query) for query in queries(dashboard))


def test_every_metric_is_on_the_dashboard(dashboard: dict[str, Any]) -> None:
    text = " ".join(queries(dashboard))
    assert [metric.name for metric in METRICS if f"ray_{metric.name}" not in text] == []


def test_every_tag_that_a_query_groups_or_filters_by_is_one_of_its_metric(dashboard: dict[str, Any]) -> None:
    by_name = {f"ray_{metric.name}": metric for metric in METRICS}
    for query in queries(dashboard):
        if query.startswith("label_values"):
            continue
        name = re.sub("_bucket$", "", SERIES.findall(query)[0])
        tags = {tag.strip() for group in re.findall(r"by \(([^)]*)\)", query) for tag in group.split(",")}
        tags |= set(re.findall(r"[{,] *([a-z_]+) *[!=]", query))
        assert tags <= {*POOL_TAGS, *by_name[name].tags, "le"}, query


def test_it_is_a_dashboard_that_grafana_takes(dashboard: dict[str, Any]) -> None:
    assert dashboard["uid"]
    assert dashboard["title"]
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
            assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])


def test_the_docs_have_each_metric_with_its_kind_and_tags() -> None:
    text = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(raycore_[a-z_]+)` \| (\w+) \| ?([^|]*)\|", text, re.MULTILINE)
    assert {name: (kind, tuple(re.findall(r"`(\w+)`", tags))) for name, kind, tags in rows} == {
        metric.name: (metric.kind, metric.tags) for metric in METRICS
    }


def test_names_are_as_prometheus_wants_them() -> None:
    for metric in METRICS:
        assert metric.name.startswith("raycore_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.name.endswith("_s") == (metric.kind == "histogram")
        assert list(metric.boundaries) == sorted(metric.boundaries)
        assert bool(metric.boundaries) == (metric.kind == "histogram")
