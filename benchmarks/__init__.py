"""One script per measurement: python -m benchmarks.NAME [--json] [--quick]. A leading _ marks what they share."""
