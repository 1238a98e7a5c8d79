"""The ops on packed rows, one folder each: api.py (validation, autograd), reference.py, and a file per backend."""
