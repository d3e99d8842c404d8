"""Sources -> order -> pictures -> batches. TensorFlow is imported by the modules, not here."""

import os

# TensorFlow only reads data here: what it has to say of its kernels interests nobody, and oneDNN's,
# which would announce themselves at every start, have nothing to do.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
