"""What a run shows to people: pages, tables, plots, and pictures with masks and boxes drawn in."""
