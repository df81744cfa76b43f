"""What is done to a run to spoil it, and whether it was spoiled: `make reliability` runs all of it."""
