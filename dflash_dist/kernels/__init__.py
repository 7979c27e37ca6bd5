"""What the mathematics is computed with: one interface a purpose, and behind it what suits a CPU or a GPU."""
