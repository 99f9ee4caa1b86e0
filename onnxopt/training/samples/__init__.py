"""What is trained on: where it comes from, how it is changed, in which order it comes."""
