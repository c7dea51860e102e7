"""What is a model: its shape, its files, its loss and its scores?"""
