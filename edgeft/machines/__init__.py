"""What does a machine have, and what may this process take of it?"""
