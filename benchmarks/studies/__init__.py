"""Studies: each answers one question once, and writes a table or a picture."""
