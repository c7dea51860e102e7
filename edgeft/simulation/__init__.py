"""What does a training step hold in memory, found by running it without weights?"""
