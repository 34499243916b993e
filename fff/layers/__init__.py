"""Layers: parameters and calls to ops, one file each; all but `none` keep `fff.layers.contract`."""
