"""What a step minimises: weights of a block's slots times the loss of their tokens; and what it shows of that."""
