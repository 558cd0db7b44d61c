"""Progressive step distillation (Salimans & Ho 2022; Sun et al. 2023): a student that samples in half the steps."""
