"""Online distillation for image classification."""
