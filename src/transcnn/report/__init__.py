"""What a run shows to people: pages, tables, plots, and images with masks and boxes drawn in."""
