"""Compiles the train step for TPU pods that nobody has to rent, and reads what comes out.

`python -m clip_jax.aot --config=configs/vitb16.py --topology=v5e:16x16`; see docs/pods.md.
"""
