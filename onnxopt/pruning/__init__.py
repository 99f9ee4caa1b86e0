"""What makes models smaller at a loss: which channels, elements, blocks and ranks go."""
