"""What does everything use? Arrays of NumPy or CuPy, trees of arrays, settings and presets, errors, files, and what
this machine has."""
