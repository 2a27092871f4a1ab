"""A pure step -> compiled, captured, replayed: shapes, staging, compilation. Knows traces of (T, R), no requests."""
