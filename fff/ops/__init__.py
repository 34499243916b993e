"""Pure functions on tensors: routing decisions, order of rows by expert, expert computation, balance losses.

Axis letters used in every signature:
T rows (tokens, samples), D input width, O output width, E experts (leaves), L expert (leaf) width,
K chosen experts per row, N tree nodes, d tree depth.
"""
