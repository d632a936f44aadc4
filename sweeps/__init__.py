"""Sweep configs, search space, controls, the controller with its executors, and the Pareto choice."""
