from benchmarks.tables_diffussm import diffussm  # noqa: F401
