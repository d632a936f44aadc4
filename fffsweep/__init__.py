"""fffsweep: controlled experiments on the depth and width of fast feedforward networks."""

__version__ = "0.1.0"
