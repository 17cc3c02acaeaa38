"""What a model is worth: evaluations on held-out text during training, and a sample of text.

`registry.py` says how to add an evaluation.
"""
