"""Ray Serve's flags: patience with a proxy that starts, and HAProxy in front of the replicas instead of Serve's own proxy.

Serve reads its flags when it is imported, so this comes before `ray.serve`.
"""

from __future__ import annotations

import os

HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # A replica that ends waits so many seconds for balancers to notice. 30 is for those outside; HAProxy here is told within a second.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
}


PATIENCE = {
    # Serve ends a proxy that has not started after 5 s and starts another: on a busy machine none ever does.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "50",
}


def use_flags(*, haproxy: bool) -> None:
    """For this process and what `controller_options` starts; what the environment says already stays."""
    for name, value in {**PATIENCE, **(HAPROXY if haproxy else {})}.items():
        os.environ.setdefault(name, value)


def controller_options() -> dict[str, dict[str, dict[str, str]]] | None:
    """What `serve.start` gives Serve's controller, and it its replicas and proxies: this process's flags. None: there are none."""
    flags = {name: value for name, value in os.environ.items() if name.startswith("RAY_SERVE_")}
    return {"runtime_env": {"env_vars": flags}} if flags else None
