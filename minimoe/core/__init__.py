"""What does everything use? NumPy and CuPy arrays, trees of arrays, settings and presets, errors, files, and the
resources of this machine."""
