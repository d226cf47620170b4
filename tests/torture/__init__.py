"""What is done to the project here: kills, crashes, full disks, damaged bytes, hostile files, malformed input.

A little of it is part of `pytest`. `make torture` does it in full: `pytest tests/torture --torture 20` is twenty times
as much. Everything random depends on --torture-seed, which is printed, so that a failure can be made again.
"""
