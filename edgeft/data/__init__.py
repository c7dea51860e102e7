"""How do rows of a file become batches of tokens?"""
