"""RMSNorm in PyTorch, Hugging Face's order. norm_torch.py INPUT OUTPUT"""

import sys

import torch
from safetensors.torch import load_file, save_file

given = load_file(sys.argv[1])
x = given["x"].float()
normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + given["eps"].item())
save_file({"y": given["weight"] * normed.bfloat16()}, sys.argv[2])
