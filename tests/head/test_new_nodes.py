"""Ranks that no node takes make Ray's own autoscaler add nodes, here processes of its fake provider."""

from __future__ import annotations

import json
import sys

import pytest

from tests.support.head import SPARE, Head, raycore

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

GROWS = f"""
import json, raycore
settings = dict(engine="echo", pool="grows", resources_per_engine={{"{SPARE}": 1}}, timeouts={{"new_nodes_s": 60}})
with raycore.launch(**settings) as client:
    text = client.generate("hello", raycore.SamplingParams(max_tokens=7)).collect().text
    report = client.scale_elastic_ep(2)
    nodes = {{member["node_id"] for member in raycore.pool_status("grows")["members"]}}
print(json.dumps({{"text": text, "ranks": report.ranks, "nodes": len(nodes)}}))
"""
WAITS_IN_VAIN = f"""
import raycore
try:
    with raycore.launch(engine="echo", pool="vain", resources_per_engine={{"{SPARE}": 2}}, timeouts={{"new_nodes_s": 3}}):
        pass
except raycore.CapacityError as error:
    print(error)
"""


def test_pending_ranks_make_the_autoscaler_add_nodes_at_launch_and_at_scale(head: Head) -> None:
    grown = head.run(sys.executable, "-c", GROWS)
    assert grown.returncode == 0, grown.stderr
    assert json.loads(grown.stdout.splitlines()[-1]) == {"text": "hellohe", "ranks": [0, 1], "nodes": 2}


def test_what_no_new_node_would_take_is_told_after_the_limit_and_leaves_nothing(head: Head) -> None:
    refused = head.run(sys.executable, "-c", WAITS_IN_VAIN)
    assert "no node came within 3 s: 1 rank of CPU 1, spare 2 each" in refused.stdout, refused.stderr
    assert "nothing was left" in raycore(head, "cleanup", "vain").stdout
