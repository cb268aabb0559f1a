"""The engine-core client: channels, router, journal and calls, held together by composition."""
