"""Distillation from a fixed, pre-trained teacher, for image classification (Tables 8 and 9)."""
