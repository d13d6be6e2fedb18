"""Only the selected entries trainable: leaves in the place of dense weights."""
