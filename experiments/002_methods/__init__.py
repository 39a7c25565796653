"""Which methods forget, what do they spare, and is it gone?"""
