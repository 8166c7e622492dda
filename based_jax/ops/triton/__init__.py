"""How operations run in the Triton kernels of `pallas_kernels.triton`: a file an operation, and what they share.

Each file of an operation says which calls the kernels take (`supports`), when others are faster (`slower`), and how
they are called, gradients and meshes included (`compute`).
"""
