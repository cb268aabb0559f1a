"""The HTTP front: an OpenAI-compatible ASGI application over one asynchronous client. It knows nothing of Ray."""
