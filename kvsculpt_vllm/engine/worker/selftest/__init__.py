"""Are the kernels right on this device, with this model's numbers? Asked at start-up and by `kvsculpt selftest`."""
