"""One training script and the accelerate config files that start it on many GPUs and several machines."""
