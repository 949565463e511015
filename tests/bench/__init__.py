"""`make bench`: what Aerie costs over the floor, measured in one run, as ratios of medians."""
