"""The study of ``max_columns``: what becomes of accuracy where masks use few columns."""
