"""Adapters to other frameworks, a file each, imported only when asked for."""
