"""How do a plan, a run and a bundle read, on a screen and on a page?"""
