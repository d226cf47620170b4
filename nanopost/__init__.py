"""nanopost: minimal, from-scratch LLM post-training. The methods are the train_*.py scripts beside this package."""

__version__ = "0.1.0"
