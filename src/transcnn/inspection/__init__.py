"""What a data set is, before anything is trained: counts, sizes, faults, duplicates, examples."""
