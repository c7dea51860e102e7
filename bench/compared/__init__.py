"""The parts of bench/methods.py: ways, their runs, how they are compared, and what is written of it."""
