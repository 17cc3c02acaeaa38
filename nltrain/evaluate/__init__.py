"""What a model is worth: loss on held-out text beside what counting achieves, and a sample."""
