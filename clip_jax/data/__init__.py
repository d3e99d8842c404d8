"""Sources -> order -> pictures -> batches. TensorFlow is imported by the modules, not here."""
