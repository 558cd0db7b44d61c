"""Distillation of diffusion transformers (Peebles & Xie 2023; Table 7): a smaller network that denoises as well."""
