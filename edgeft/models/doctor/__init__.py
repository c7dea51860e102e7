"""What is wrong with a folder that somebody points a trainer at, and what of it can be put right?"""
