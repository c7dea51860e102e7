"""What can come out of an export, and how does each runtime keep weights?"""
