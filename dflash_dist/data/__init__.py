"""Chat rows become token ids with a loss mask, then packed rows, then batches."""
