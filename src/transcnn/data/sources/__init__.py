"""What images are read from: one module a format; :mod:`.opening` finds out which."""
