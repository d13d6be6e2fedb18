"""From scores to a mask: ranking, exact selection, the mask itself, its summary."""
