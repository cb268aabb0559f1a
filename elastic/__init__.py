"""Scaling as decisions: where ranks go. Pure; no Ray, no sockets."""
