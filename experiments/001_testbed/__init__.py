"""What makes a small model keep its facts at the last subject token?"""
