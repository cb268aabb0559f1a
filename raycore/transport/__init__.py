"""Channels between clients and engine cores: ZeroMQ between processes, memory within one. ZeroMQ is imported only here."""
