"""H-MHSA in any CNN: where it goes, and how it gets there and out again."""
