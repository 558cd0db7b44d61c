"""Distillation of diffusion models (Tables 6 and 7): fewer sampling steps, smaller networks."""
