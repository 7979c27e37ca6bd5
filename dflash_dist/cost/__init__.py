"""What things cost: time and memory, measured side by side with the obvious way."""
