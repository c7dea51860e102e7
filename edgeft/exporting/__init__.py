"""How does a merged checkpoint become a proven bundle?"""
