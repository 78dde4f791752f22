"""Triton kernels of RMSNorm -> QKV -> head norm (-> RoPE) and their launchers. Needs torch and triton, nothing else."""
