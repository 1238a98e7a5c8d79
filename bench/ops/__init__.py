"""Benchmarks of single ops: forward, grad-input and grad-weight apart."""
