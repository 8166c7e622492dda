"""How operations run in kernels for TPUs: a file an operation, and what they share.

Each file of an operation says which calls the kernels take (`supports`) and how they are called, gradients and meshes
included (`compute`).
"""
