"""nanopost: minimal, from-scratch LLM post-training. The four train_*.py scripts beside this package are the methods."""

__version__ = "0.1.0"
