"""How products run on an NVIDIA GPU: PTX instructions, the tile vocabulary, kernels, configs and their launch.

Imported only when an array on a GPU turns up.
"""
