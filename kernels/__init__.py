"""Triton kernels of RMSNorm -> QKV -> head norm and their launchers. Needs torch and triton, nothing else."""
