"""Seeing what a network has learned."""

from spark_fast.evaluate.curve import draw_loss_curve
from spark_fast.evaluate.grid import reconstruction_grid, save_grid

__all__ = ["draw_loss_curve", "reconstruction_grid", "save_grid"]
