"""The steps of a decoder block between its linear layers, one kernel each (ops.py), written in Triton for CUDA."""
