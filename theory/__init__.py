"""Convergence of delayed gradients, checked numerically: problems, bounds, verdicts."""
