"""What quantising the experts changes in answers: ``python -m benchmarks.quality``."""
