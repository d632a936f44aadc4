"""CMM on CUDA devices: Triton kernels, forward and backward, and the baselines they are held against.

`operator.py` is the host side and imports Triton only when it is called; the kernels lie in `device.py` (shared functions), `walk.py`
(a token a program), `route.py` (tokens bucketed by node, tensor cores) and `gradients.py`.
"""
