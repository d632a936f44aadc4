"""Conditional matrix multiplication (CMM): reference, fast kernels, dense baselines, and the benchmark that compares them.

Import the submodules: `fffsweep.kernels.shape`, `.cmm`, `.registry`, `.measure`, `.bench`. They need torch and numpy alone.
"""
