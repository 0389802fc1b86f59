"""What runs on a CUDA device: tests, benchmarks and an expert's whole life at a real anchor's size. ``make gpu``."""
