"""RESTOR: after false facts were trained in and unlearned, do the clean answers come back?"""
