"""Layers: parameters and calls to ops, one file each; all of them keep `fff.layers.contract`."""
