"""The sections of `python -m bench.gpu_check`, one module each: `run(section)` records cases."""
