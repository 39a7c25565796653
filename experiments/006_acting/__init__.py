"""Does acting where a locator points hurt the fact more than acting elsewhere?"""
