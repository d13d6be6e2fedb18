"""What is measured: models, data, masks; the same each time."""
