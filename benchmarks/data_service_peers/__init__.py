"""The systems that benchmarks/data_service.py compares, one file each."""
