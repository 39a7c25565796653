"""Real subjects, learnt from scratch: what is left after forgetting 1, 5 and 10 %?"""
