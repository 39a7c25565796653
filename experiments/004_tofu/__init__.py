"""TOFU, learnt from scratch: does forget quality see what was only suppressed?"""
