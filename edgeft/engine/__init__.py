"""What does one training process do, step by step: what trains now, and how?"""
