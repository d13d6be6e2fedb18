"""One folder per backend, in which each op is a function of the same name and signature.

Beside them what several backends share: how moments in fewer bits are stored, and packed state.
"""
