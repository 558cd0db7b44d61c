"""What trained pairs do: attention statistics (Table 17), maps (Figure 1), calibration (Figure 10), training curves."""
