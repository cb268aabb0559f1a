"""The Ray shells: the only package that imports Ray."""
