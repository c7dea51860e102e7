"""What lies between base and fine-tuned, and how much of it is taken?"""
