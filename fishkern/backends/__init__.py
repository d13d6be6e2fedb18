"""One folder per backend; each op is a function of the same name and signature in each."""
