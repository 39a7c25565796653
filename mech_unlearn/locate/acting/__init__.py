"""Testing what a locator says: do its top sites matter more than as many others, and do several locators agree?"""
